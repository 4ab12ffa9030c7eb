// Keeps a live page up to date: asks its server for what is new, and puts it in its place.
(() => {
  "use strict";
  const status = document.getElementById("live");
  const content = document.getElementById("content");
  let version = -1, key = "", pause = 1000, since = Date.now();

  const say = (text, kind) => {
    status.textContent = text;
    status.dataset.kind = kind;
  };

  // Replaces what stands in a place, unless it is the same; what was open or scrolled stays so.
  const put = (place, html) => {
    if (place.dataset.html === html) return;
    const open = [...place.querySelectorAll("details")].map((one) => one.open);
    const scrolled = [...place.querySelectorAll(".scroll")].map((one) => [one.scrollLeft, one.scrollTop]);
    place.innerHTML = html;
    place.dataset.html = html;
    place.querySelectorAll("details").forEach((one, i) => (one.open = open[i] ?? one.open));
    place.querySelectorAll(".scroll").forEach((one, i) => scrolled[i] && one.scrollTo(...scrolled[i]));
  };

  const take = (state) => {
    if (state.content !== undefined) {
      content.innerHTML = state.content;
      document.dispatchEvent(new Event("pictures"));
    }
    put(document.getElementById("head"), state.head);
    state.tables.forEach((html, i) => put(content.querySelectorAll(".tables")[i], html));
    state.figures.forEach((figure, i) => {
      const place = document.getElementById(`f${i}`);
      const text = JSON.stringify(figure);
      if (place.textContent === text) return;
      place.textContent = text;
      content.querySelectorAll(".plot")[i].dispatchEvent(new Event("figure"));
    });
    [version, key, since] = [state.version, state.key, Date.now()];
    if (state.ended) say("The training has ended.", "ended");
    return !state.ended;
  };

  const ask = async () => {
    let go = true;
    try {
      const answer = document.hidden ? null : await fetch(`state?version=${version}&key=${key}`, { cache: "no-store" });
      if (answer && answer.status === 200) go = take(await answer.json());
      else if (answer && answer.status !== 204) throw new Error(answer.status);
      pause = 1000;
      if (go) {
        const quiet = Math.round((Date.now() - since) / 1000);
        say(quiet < 10 ? "Live" : `Live; nothing new for ${quiet} s`, "live");
      }
    } catch (error) {
      say("No connection: the training has ended or was stopped. This is the last that was heard of it.", "lost");
      pause = Math.min(2 * pause, 15000);
    }
    if (go) setTimeout(ask, pause);
  };
  ask();
})();
