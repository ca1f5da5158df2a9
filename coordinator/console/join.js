// Pairing links and revocation: the two things this page can change.

import { byId, setText } from "./dom.js";
import { drawCode } from "./qr.js";

export function setUpJoin(api, showError) {
  byId("add-device").addEventListener("click", async () => {
    try {
      const { link, command } = await api.createJoinLink();
      byId("join-command").value = command;
      byId("join-link").value = link;
      byId("join-code").replaceChildren(...drawCode(link));
      byId("join").showModal();
    } catch (error) {
      showError(error);
    }
  });
  for (const [button, field] of [["copy-command", "join-command"], ["copy-link", "join-link"]]) {
    byId(button).addEventListener("click", () => copy(byId(button), byId(field)));
  }
}

async function copy(button, field) {
  field.select();
  try {
    await navigator.clipboard.writeText(field.value);
    setText(button, "Copied");
  } catch {
    setText(button, "Press Ctrl + C"); // the clipboard needs a secure context; the text is selected
  }
  setTimeout(() => setText(button, "Copy"), 2000);
}

// Asks first: revoking cuts the device off at once, and it has to be paired again.
export function askToRevoke(api, device, showError) {
  const dialog = byId("confirm");
  setText(byId("confirm-text"), `${device.name} is cut off now and the rest is planned anew. To come back it must be paired again.`);
  dialog.returnValue = "cancel";
  dialog.addEventListener("close", async () => {
    if (dialog.returnValue !== "revoke") return;
    try { await api.revoke(device.id); } catch (error) { showError(error); }
  }, { once: true });
  dialog.showModal();
}
