// The page asks twice a second, and only while it can be seen, whether the state has changed; if so it clicks the
// hidden sync button, which renders what is new. A short request each time: browsers allow only six open ones a host.
(() => {
  const EVERY_MS = 500;
  const LIMIT_MS = 5000; // for one answer: a server that hangs is told of like one that is gone
  let shown = null;
  let downloads = null;
  let training = null;
  let asked = 0;
  let failures = 0;

  const element = (id) => document.getElementById(id);
  const usable = (button) => button && !button.disabled && button.offsetParent !== null;

  function lost(yes) {
    const bar = element("lost");
    if (!yes) return bar?.remove();
    if (bar) return;
    const made = document.createElement("div");
    made.id = "lost";
    made.setAttribute("role", "alert");
    made.textContent = "The server does not answer. Trying again …";
    document.body.append(made);
  }

  // Written here and not by the server: rendering twice a second what only the speed changes would slow the answer.
  function showRate(status) {
    const place = document.querySelector("#status .rate");
    if (!place) return;
    const waiting = status.generating > 1 && status.waiting ? `, ${status.waiting} waiting` : "";
    const text = status.generating ? `${status.tokens_per_second} tokens/s${waiting}` : "";
    if (place.textContent !== text) place.textContent = text;
  }

  // How things stand; null where that cannot be had now.
  async function current() {
    try {
      const limit = { cache: "no-store", signal: AbortSignal.timeout(LIMIT_MS) };
      const answer = await fetch("v1/internal/model/status", limit);
      if (answer.status === 401) location.reload(); // logged out, or the server has started anew
      return answer.ok ? await answer.json() : null;
    } catch {
      return null;
    }
  }

  async function ask() {
    const status = await current();
    if (!status) {
      failures += 1;
      if (failures > 2) lost(true);
      return;
    }
    // After a while without a server, everything is looked at anew: it may be another one.
    if (failures > 2) shown = downloads = training = null;
    failures = 0;
    lost(false);
    if (status.shown !== shown && element("sync")) {
      shown = status.shown;
      element("sync").click();
    }
    if (status.downloads !== downloads && element("sync-downloads")) {
      downloads = status.downloads;
      element("sync-downloads").click();
    }
    // Only while the tab is shown: a curve is drawn with every step.
    if (status.training !== training && element("training-start")?.offsetParent) {
      training = status.training;
      element("sync-training").click();
    }
    if (element("now")?.offsetParent && asked++ % 4 === 0) element("sync-now")?.click(); // every two seconds
    showRate(status);
    explain(status.state);
  }

  async function loop() {
    if (document.visibilityState === "visible") await ask();
    setTimeout(loop, EVERY_MS);
  }

  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && ask());

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || event.isComposing) return;
    // Esc first closes what is open: a menu, a message that is being edited.
    if (event.target.closest?.('[aria-expanded="true"], #chatbot textarea')) return;
    const button = ["stop", "cancel", "cancel-load"].map(element).find(usable);
    if (button) button.click();
  });

  // What is sent is what stood there at Enter: Gradio asks for it a moment later, when more may have been typed. Where
  // nobody asks, since an answer is awaited still, it goes back.
  const set = (field, text) => {
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  document.addEventListener("keydown", (event) => {
    const field = event.target;
    const composing = event.isComposing || event.keyCode === 229; // Safari tells by the code alone
    if (event.key !== "Enter" || event.shiftKey || composing || !field.matches?.("#message textarea")) return;
    if (!field.value.trim() || window.loadstoneSent || !usable(element("send"))) return;
    window.loadstoneSent = field.value;
    set(field, "");
    setTimeout(() => {
      const sent = window.loadstoneSent;
      delete window.loadstoneSent;
      if (sent) set(field, sent + field.value);
    }, 1000);
  }, true);

  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("[data-copy]");
    if (!button) return;
    await navigator.clipboard.writeText(button.parentElement.querySelector("pre").textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });

  // What was unfolded stays so when the card around it is rendered anew: Gradio takes "open" away, or makes a new one.
  const unfolded = new Set();
  document.addEventListener("click", (event) => {
    const details = event.target.closest?.("summary")?.parentElement;
    const key = details?.dataset.keep;
    if (key) details.open ? unfolded.delete(key) : unfolded.add(key);
  }, true);
  new MutationObserver(() => {
    for (const key of unfolded) {
      for (const folded of document.querySelectorAll(`details[data-keep="${key}"]:not([open])`)) folded.open = true;
    }
  }).observe(document.documentElement, { childList: true, subtree: true, attributes: true, attributeFilter: ["open"] });

  // A greyed button says why, Reload which model; a sign has a name.
  const BUSY = ["starting", "loading", "unloading"];
  const WHY = {
    load: "Something is being loaded.", unload: "No model is loaded.", reload: "No model was loaded yet.",
    "lora-apply": "The chosen model is not loaded: Load applies its LoRAs too.", "lora-remove": "No LoRA is active.",
    "training-start": "A training is under way.", "perplexity-start": "A text is being measured.",
    regenerate: "There is no answer yet, or one is coming.", undo: "There is nothing to take back, or an answer is coming.",
  };
  const OF_A_LOAD = ["load", "unload", "reload", "lora-apply", "lora-remove"];
  function explain(state) {
    const last = document.querySelector("#card [data-last]")?.dataset.last;
    for (const [id, why] of Object.entries(WHY)) {
      const button = element(id);
      const waits = BUSY.includes(state) && OF_A_LOAD.includes(id);
      const does = id === "reload" && last ? `Loads ${last} again, with the same options and LoRAs.` : "";
      if (button) button.title = button.disabled ? (waits ? `Wait: a model is ${state}.` : why) : does;
    }
    element("refresh")?.setAttribute("aria-label", "Look for new models");
    element("cancel-load")?.classList.toggle("unseen", Boolean(usable(element("cancel")))); // one is enough
  }

  loop();
})();
