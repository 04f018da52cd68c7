// Gradio's sign that something is loading counts its seconds with every frame, and the one of the opening page never
// stops: a page that nobody touches would draw 60 times a second, on the processor that the model may need. Here it
// counts ten times a second, which is what it shows. Runs before Gradio does, which keeps the function it finds.
(() => {
  const COUNTS = /performance\.now\(\)[^;]*\/\s*(1e3|1000)\b/;
  const EVERY_MS = 100;
  const onFrame = window.requestAnimationFrame.bind(window);
  window.requestAnimationFrame = (then) =>
    COUNTS.test(then) ? setTimeout(() => then(performance.now()), EVERY_MS) : onFrame(then);
})();
