// The coordinator's HTTP API as this page uses it. The key lives in this tab's session storage and in one header; a WebSocket
// can have no other header than its list of subprotocols.

const STORED = "edge-runtime-key";

export class ApiFailure extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `The coordinator answered ${status}.`);
    this.status = status;
    this.hint = body?.error?.hint ?? "";
  }
}

// The key from `#key=…` (taken out of the address at once) or from an earlier visit in this tab.
export function findKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    history.replaceState(null, "", location.pathname + location.search);
    sessionStorage.setItem(STORED, given);
  }
  return sessionStorage.getItem(STORED) ?? "";
}

const base64url = (text) => btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");

export const keepKey = (key) => sessionStorage.setItem(STORED, key);
export const forgetKey = () => sessionStorage.removeItem(STORED);

export class Api {
  constructor(key) { this.key = key; }

  async call(method, path, body, signal) {
    const headers = { Authorization: `Bearer ${this.key}` };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
    if (!response.ok) throw new ApiFailure(response.status, await response.json().catch(() => null));
    return response;
  }

  async json(method, path, body) { return (await this.call(method, path, body)).json(); }

  status() { return this.json("GET", "/admin/status"); }
  createJoinLink() { return this.json("POST", "/admin/join-links"); }
  revoke(device) { return this.json("POST", `/admin/devices/${encodeURIComponent(device)}/revoke`); }

  openDrafting() {
    const url = new URL("/v1/drafting", location.origin.replace(/^http/, "ws"));
    return new WebSocket(url, ["edge-runtime.drafting", `edge-runtime.key.${base64url(this.key)}`]);
  }

  async *watch(signal) {
    for await (const { data } of readEvents(await this.call("GET", "/admin/events", undefined, signal))) yield JSON.parse(data);
  }

  async *complete(request, signal) {
    const body = { ...request, stream: true, stream_options: { include_usage: true } };
    for await (const { data } of readEvents(await this.call("POST", "/v1/completions", body, signal))) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiFailure(200, chunk);
      yield chunk;
    }
  }
}

// Server-sent events of a fetch (EventSource cannot send a key). Comments are dropped.
export async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += value;
    for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
      const event = { data: "" };
      for (const line of rest.slice(0, end).split("\n")) {
        const colon = line.indexOf(": ");
        if (colon > 0) event[line.slice(0, colon)] = line.slice(colon + 2);
      }
      rest = rest.slice(end + 2);
      if (event.data) yield event;
    }
  }
}
