// The answer that is coming, between two renderings by Gradio: its newest text, added as plain text to the
// last paragraph that is rendered. The line under the chat names the answer and says how much of it is rendered.
(() => {
  let name = "";
  let text = "";
  let tail = null;

  const line = () => document.querySelector("#chat-line [data-live]");

  // Where the rendered text ends: in its last paragraph, list item, cell or block of code.
  function end(place) {
    const rendered = [...document.querySelectorAll(`#${place} .bot .md`)].at(-1);
    let inner = rendered;
    while (inner?.lastElementChild && /^(P|UL|OL|LI|PRE|CODE|DIV|BLOCKQUOTE|TABLE|TBODY|TR|TD|H\d)$/.test(inner.lastElementChild.tagName)) {
      inner = inner.lastElementChild;
    }
    return inner;
  }

  function show() {
    const { place, rendered } = line()?.dataset ?? {};
    if (!Number(rendered)) return; // nothing stands there yet that could be gone on with
    const log = document.querySelector(`#${place} .bubble-wrap`);
    const follows = log && log.scrollHeight - log.scrollTop - log.clientHeight < 100;
    if (!tail?.isConnected) {
      const inner = end(place);
      if (!inner) return;
      tail = document.createElement("span");
      tail.className = "tail";
      tail.append("");
      inner.append(tail);
    }
    tail.firstChild.data = text.slice(Number(rendered));
    if (follows) log.scrollTop = log.scrollHeight;
  }

  async function follow(wanted) {
    name = wanted;
    text = "";
    let rest = "";
    const answer = await fetch(`live/${name}`, { cache: "no-store" });
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let part = await reader.read(); !part.done && name === wanted; part = await reader.read()) {
      const lines = (rest + part.value).split("\n");
      rest = lines.pop();
      for (const each of lines) text += JSON.parse(each);
      show();
    }
  }

  new MutationObserver(() => {
    const coming = line();
    if (!coming) {
      tail?.remove();
      tail = null;
    } else if (coming.dataset.live !== name) {
      follow(coming.dataset.live).catch(() => {}); // then Gradio's renderings alone show it
    } else {
      show();
    }
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
