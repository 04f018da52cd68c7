// The page asks twice a second, and only while it can be seen, whether the state has changed; if so it clicks the
// hidden sync button, which renders what is new. A short request each time: browsers allow only six open ones a host.
(() => {
  const EVERY_MS = 500;
  let shown = null;
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
    const waiting = status.generating > 1 ? `, ${status.generating - 1} waiting` : "";
    const text = status.generating ? `${status.tokens_per_second} tokens/s${waiting}` : "";
    if (place.textContent !== text) place.textContent = text;
  }

  async function ask() {
    try {
      const answer = await fetch("v1/internal/model/status", { cache: "no-store" });
      const status = await answer.json();
      failures = 0;
      lost(false);
      if (status.shown !== shown && element("sync")) {
        shown = status.shown;
        element("sync").click();
      }
      showRate(status);
    } catch {
      failures += 1;
      if (failures > 2) lost(true);
    }
  }

  async function loop() {
    if (document.visibilityState === "visible") await ask();
    setTimeout(loop, EVERY_MS);
  }

  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && ask());

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented) return;
    const button = ["stop", "cancel"].map(element).find(usable);
    if (button) button.click();
  });

  document.addEventListener("click", async (event) => {
    const button = event.target.closest?.("[data-copy]");
    if (!button) return;
    await navigator.clipboard.writeText(button.parentElement.querySelector("pre").textContent);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });

  loop();
})();
