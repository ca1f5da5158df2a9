// The console: one status, many views of it. Knows how views are wired; each view draws its own part.

import { Api, findKey, forgetKey, keepKey } from "./api.js";
import { RateChart } from "./chart.js";
import { DeviceList } from "./devices.js";
import { byId, h, setText, whenChanged } from "./dom.js";
import { bytes } from "./format.js";
import { askToRevoke, setUpJoin } from "./join.js";
import { drawPlan, plansOf } from "./plan.js";
import { PromptBox } from "./prompt.js";
import { drawRequests } from "./requests.js";
import { drawTopology } from "./topology.js";

const RETRY_MS = 2000;

const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));

function showBanner(text) {
  setText(byId("banner"), text);
  byId("banner").hidden = text === "";
}

const showError = (error) => showBanner([error.message, error.hint].filter(Boolean).join(" Hint: "));

function showState(text, tone) {
  setText(byId("state"), text);
  byId("state").className = `pill ${tone}`;
}

function makeViews(api) {
  const chart = new RateChart();
  const devices = new DeviceList((device) => askToRevoke(api, device, showError));
  const prompt = new PromptBox(api);
  const plan = whenChanged(drawPlan), requests = whenChanged(drawRequests), model = whenChanged(drawModel);
  let status = null;
  const drawPipeline = () => status && drawTopology(status);
  const topology = whenChanged(drawPipeline);
  new ResizeObserver(drawPipeline).observe(byId("topology"));
  setInterval(() => chart.tick(), 1000);
  return (next) => {
    status = next;
    if (chart.update(next)) chart.tick();
    devices.update(next);
    prompt.update(next.model);
    const plans = plansOf(next);
    plan(plans);
    requests(next.requests.map(({ age_seconds, ...rest }) => rest));
    model({ ...next.model, size: next.model_weight_bytes });
    topology([plans.map((each) => each.stages), next.devices.map((device) => [device.name, device.weight_bytes]), next.requests.length > 0]);
    const isReady = plans.some((each) => each.ready);
    showState(isReady ? "serving" : "no pipeline ready", isReady ? "good" : "warn");
  };
}

function drawModel(model) {
  const facts = [model.family, model.weights, bytes(model.size), `context ${model.max_context_tokens}`];
  byId("model").replaceChildren(h("strong", {}, model.name), ` · ${facts.join(" · ")}`);
}

async function follow(api, show) {
  for (;;) {
    try {
      for await (const status of api.watch()) {
        showBanner("");
        show(status);
      }
    } catch (error) {
      if (error.status === 401 || error.status === 403) return error;
    }
    showState("not connected", "bad");
    showBanner("The coordinator does not answer. Trying again.");
    await pause(RETRY_MS);
  }
}

async function open(key) {
  const api = new Api(key);
  await api.status(); // a wrong key fails here, before anything is shown
  keepKey(key);
  byId("login").hidden = true;
  byId("board").hidden = false;
  setUpJoin(api, showError);
  return follow(api, makeViews(api));
}

function askForKey(complaint) {
  byId("board").hidden = true;
  byId("login").hidden = false;
  setText(byId("login-error"), complaint);
  byId("key").focus();
}

byId("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  await start(byId("key").value.trim());
});

async function start(key) {
  try {
    await open(key); // returns only when the key stopped working
    forgetKey();
    location.reload();
  } catch (error) {
    if (error.status === 401 || error.status === 403) forgetKey();
    askForKey(error.message);
  }
}

const key = findKey();
if (key) await start(key);
else askForKey("");
