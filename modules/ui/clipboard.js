// What is copied from the page, by whatever button or key.
(() => {
  // tags.py puts an unseen character behind each "<" that would begin a tag.
  const written = (text) => text.replaceAll("<\u2060", "<");

  // A page that is shared by http:// on a network has no clipboard of its own: browsers keep it for https and localhost.
  function byCommand(text) {
    const field = document.createElement("textarea");
    field.value = text;
    field.style.position = "fixed";
    field.style.opacity = "0";
    const before = document.activeElement;
    document.body.append(field);
    field.select();
    const copied = document.execCommand("copy");
    field.remove();
    before?.focus?.();
    return copied ? Promise.resolve() : Promise.reject(new Error("The browser does not let this page copy."));
  }

  const own = navigator.clipboard;
  const write = own ? own.writeText.bind(own) : byCommand;
  if (!own) Object.defineProperty(navigator, "clipboard", { value: {}, configurable: true });
  navigator.clipboard.writeText = (text) => write(written(text));

  document.addEventListener("copy", (event) => {
    const selected = String(document.getSelection());
    if (event.defaultPrevented || written(selected) === selected) return;
    event.clipboardData.setData("text/plain", written(selected));
    event.preventDefault();
  });
})();
