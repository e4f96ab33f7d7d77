"use strict";
(() => {
  const { charts, pairs } = JSON.parse(document.getElementById("data").textContent);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const root = document.documentElement;
  let current = 0; // the pair that is chosen
  const show = (number, digits = 4) => number.toPrecision(digits).replace("-", "−");
  const token = { chosen: 0, rejected: 0 }; // which of the tokens of each side that are there

  // Theme ---------------------------------------------------------------------------------------------------------

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const button = document.getElementById("theme");

  function setTheme(theme) {
    root.dataset.theme = theme;
    button.textContent = theme === "dark" ? "Light theme" : "Dark theme";
    all("[data-chart]").forEach((place) => delete place.dataset.drawn);
    draw();
  }

  function config() {
    const style = getComputedStyle(root);
    const [ink, quiet, line, first, second, neutral, hole] = ["ink", "quiet", "line", "first", "second", "neutral", "hole"].map(
      (name) => style.getPropertyValue("--" + name).trim(),
    );
    const font = getComputedStyle(document.body).fontFamily;
    return {
      background: "transparent", font, aria: false,
      view: { stroke: null },
      axis: {
        labelColor: quiet, titleColor: quiet, gridColor: line, domainColor: line, tickColor: line,
        labelFontSize: 11.5, titleFontSize: 12, titleFontWeight: "normal", titlePadding: 8,
      },
      legend: { labelColor: ink, titleColor: quiet, labelFontSize: 12, titleFontWeight: "normal" },
      range: { category: [first, second], diverging: [second, neutral, first] },
      mark: { color: first, invalid: null }, rule: { color: first }, point: { color: first },
      rect: { invalid: "filter" }, scale: { invalid: { color: { value: hole } } },
    };
  }

  // Charts --------------------------------------------------------------------------------------------------------

  const views = {};

  function rowsOf(name, of) {
    const pair = pairs[current];
    if (!pair) return null;
    if (name === "lens" && pair.lens) {
      return ["chosen", "rejected"].flatMap((side) => pair.lens[side].map((reward, layer) => ({ side, layer, reward })));
    }
    if (name === "tokens" && pair.tokens) {
      return ["chosen", "rejected"].flatMap((side) =>
        steps(side).map((step) => ({ side, at: step.at, token: step.word, value: step.value })),
      );
    }
    if (name === "sweep" && pair.sweep?.maps[of]) return cells(pair.sweep.maps[of]);
    return null;
  }

  function cells(map) {
    return map.layers.flatMap((layer, row) =>
      map.columns.map((word, column) => {
        const effect = map.effect[row][column];
        const label = String(column).padStart(3, "0") + "\u0000" + word.replaceAll("\u0000", "");
        const recovered = effect === null || !map.gap ? null : effect / map.gap;
        return { side: map.side, layer, column: label, token: word.replaceAll("\n", "⏎"), effect, recovered };
      }),
    );
  }

  let drawing = Promise.resolve();

  /** One chart after the other: a place that is wanted anew while it is drawn is drawn again after that. */
  function draw() {
    drawing = drawing.then(drawAll);
  }

  async function drawAll() {
    for (const place of all("[data-chart]")) {
      const name = place.dataset.chart, of = Number(place.dataset.of);
      if (place.dataset.drawn || !place.offsetParent || !charts[name]) continue;
      place.dataset.drawn = "yes";
      const spec = structuredClone(charts[name]);
      if (spec.data?.name === "pair" || spec.layer?.[0]?.data?.name === "pair") {
        const rows = rowsOf(name, of);
        if (!rows) continue;
        spec.datasets = { ...spec.datasets, pair: rows };
      }
      if (name === "sweep") {
        const effects = pairs[current].sweep.maps.flatMap(cells).map((cell) => Math.abs(cell.effect ?? 0));
        const reach = Math.max(...effects) || 1;
        spec.encoding.color.scale.domain = [-reach, 0, reach];
        spec.height = 12 * pairs[current].sweep.maps[of].layers.length;
      }
      if (name === "tokens") spec.params?.forEach((param) => (param.value = steps(param.name)[token[param.name]]?.at ?? -1));
      views[name + of]?.finalize();
      delete views[name + of];
      views[name + of] = await vegaEmbed(place, spec, {
        actions: false, ast: true, renderer: "svg", defaultStyle: false, config: config(), tooltip: { theme: "page-tip" },
      });
      place.querySelector("svg").setAttribute("aria-hidden", "true"); // the place has its description, a table its numbers
      if (name === "tokens") markTokens();
      if (!place.offsetParent) delete place.dataset.drawn; // hidden meanwhile, where it has no width
    }
  }

  // Tabs: arrow keys, Home and End move between them ----------------------------------------------------------------

  const tabs = all("[role=tab]");

  function open(id, focus = false) {
    for (const tab of tabs) {
      const chosen = tab.id === "tab-" + id;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      document.getElementById(tab.getAttribute("aria-controls")).hidden = !chosen;
      if (chosen) tab.scrollIntoView({ block: "nearest", inline: "nearest" });
      if (chosen && focus) tab.focus();
    }
    draw();
  }

  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => open(tab.getAttribute("aria-controls")));
    tab.addEventListener("keydown", (event) => {
      const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: tabs.length - 1 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      open(tabs[(to + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
    });
  });

  // The pair that is chosen -----------------------------------------------------------------------------------------

  function choose(index) {
    if (!pairs.length) return;
    current = (index + pairs.length) % pairs.length;
    views.tokens0?.finalize(); // of the pair before
    delete views.tokens0;
    all("[data-pair]").forEach((select) => (select.value = String(current)));
    for (const side of ["chosen", "rejected"]) {
      token[side] = Math.max(0, steps(side).length - 1);
      write(side);
    }
    writeSweep();
    for (const place of all("[data-chart=tokens], [data-chart=lens], [data-chart=sweep]")) delete place.dataset.drawn;
    draw();
  }

  all("[data-pair]").forEach((select) => select.addEventListener("change", () => choose(Number(select.value))));
  all("[data-pair-step]").forEach((step) =>
    step.addEventListener("click", () => choose(current + Number(step.dataset.pairStep))),
  );
  all("[data-go]").forEach((go) =>
    go.addEventListener("click", () => {
      choose(Number(go.dataset.index));
      open(go.dataset.go, true);
    }),
  );

  // Tokens ----------------------------------------------------------------------------------------------------------

  /** The tokens of a side that are stepped through: the last that both texts share, and those behind it. */
  function steps(side) {
    const tokens = pairs[current]?.tokens?.[side];
    if (!tokens) return [];
    const first = Math.max(0, pairs[current].tokens.shared - 1 - tokens.start);
    return tokens.words.slice(first).map((word, i) => ({
      word, value: tokens.values[first + i], at: tokens.start + first + i - (pairs[current].tokens.shared - 1),
      index: tokens.start + first + i, change: i ? tokens.values[first + i] - tokens.values[first + i - 1] : 0,
    }));
  }

  function element(tag, text, name) {
    const made = document.createElement(tag);
    made.textContent = text;
    if (name) made.className = name;
    return made;
  }

  function write(side) {
    const stepper = document.querySelector(`.stepper[data-side=${side}]`);
    const tokens = pairs[current]?.tokens?.[side];
    if (!stepper || !tokens) return;
    const there = steps(side);
    const slider = stepper.querySelector("input");
    slider.max = String(Math.max(0, there.length - 1));
    const words = stepper.querySelector(".words");
    const shared = tokens.words.slice(0, tokens.words.length - there.length).join("");
    words.replaceChildren(element("span", (tokens.start ? "… " : "") + shared, "shared"));
    const most = Math.max(...["chosen", "rejected"].flatMap((each) => steps(each).map((step) => Math.abs(step.change)))) || 1;
    there.forEach((step, i) => {
      const span = element("span", step.word, step.index === tokens.read ? "read" : "");
      const share = Math.round((40 * Math.abs(step.change)) / most);
      if (share) span.style.background = `color-mix(in srgb, var(--${step.change > 0 ? "up" : "down"}) ${share}%, transparent)`;
      span.addEventListener("click", () => stepTo(side, i));
      words.append(span);
    });
    const left = tokens.total - tokens.start - tokens.words.length;
    if (left > 0) words.append(element("span", ` … and ${left} tokens more`, "shared"));
    stepTo(side, token[side]);
  }

  function stepTo(side, index) {
    const stepper = document.querySelector(`.stepper[data-side=${side}]`);
    const there = steps(side);
    if (!there.length) return;
    token[side] = Math.min(Math.max(0, index), there.length - 1);
    const step = there[token[side]];
    const slider = stepper.querySelector("input");
    slider.value = String(token[side]);
    const tokens = pairs[current].tokens[side];
    const value = step.value === null ? "–" : show(step.value);
    const change = (step.change < 0 ? "" : "+") + show(step.change, 3);
    slider.setAttribute("aria-valuetext", `${step.word}, reward ${value}`);
    const now = stepper.querySelector(".now");
    now.replaceChildren(
      `Token ${step.index + 1} of ${tokens.total}: `, element("strong", `“${step.word.replaceAll("\n", "⏎")}”`), ` — reward ${value}`,
      token[side] ? `, ${change} to the one before` : "", step.index === tokens.read ? "; here the score is read" : "",
    );
    const spans = all(".words span", stepper).slice(1, 1 + there.length);
    spans.forEach((span, i) => span.classList.toggle("here", i === token[side]));
    const box = stepper.querySelector(".words"), here = spans[token[side]];
    const top = here.offsetTop - box.offsetTop;
    if (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 30) box.scrollTop = top - box.clientHeight / 2;
    const [back, on] = all("[data-token-step]", stepper);
    back.disabled = token[side] === 0;
    on.disabled = token[side] === there.length - 1;
    markTokens();
  }

  /** The tokens that are stepped to, in the chart. */
  function markTokens() {
    const view = views.tokens0?.view;
    if (!view) return;
    for (const side of ["chosen", "rejected"]) view.signal(side, steps(side)[token[side]]?.at ?? -1);
    view.runAsync();
  }

  for (const stepper of all(".stepper")) {
    const side = stepper.dataset.side;
    stepper.querySelector("input").addEventListener("input", (event) => stepTo(side, Number(event.target.value)));
    all("[data-token-step]", stepper).forEach((step) =>
      step.addEventListener("click", () => stepTo(side, token[side] + Number(step.dataset.tokenStep))),
    );
  }

  // Sweeps ----------------------------------------------------------------------------------------------------------

  const PUT_IN = {
    denoising: "Put in is the chosen text's stream, at the token of it that corresponds; grey cells have none.",
    mean: "The texts have too few tokens in common. Put in is the mean of all tokens of the shown texts, into either text's run.",
  };

  function writeSweep() {
    const sweep = pairs[current].sweep;
    document.getElementById("swept").hidden = !sweep;
    document.getElementById("no-sweep").hidden = Boolean(sweep);
    if (!sweep) return;
    document.getElementById("strongest").closest("table").classList.toggle("no-gap", sweep.mode === "mean");
    document.getElementById("put-in").textContent = PUT_IN[sweep.mode];
    for (const place of all(".map")) {
      const map = sweep.maps[Number(place.dataset.map)];
      place.hidden = !map;
      if (!map) continue;
      const gap = map.gap === null ? "" : `, ${show(map.gap)} from that of the chosen one`;
      place.querySelector(".now").textContent =
        `The ${map.side} text, of reward ${show(map.base)}${gap}. ${map.run} runs, exact up to rounding.`;
    }
    const found = sweep.maps.flatMap(cells).filter((cell) => cell.effect !== null);
    found.sort((a, b) => Math.abs(b.effect) - Math.abs(a.effect));
    document.getElementById("strongest").replaceChildren(
      ...found.slice(0, 8).map((cell) => {
        const row = document.createElement("tr");
        const word = element("th", "");
        word.scope = "row";
        word.append(element("bdi", cell.token));
        const share = cell.recovered === null ? "–" : `${(100 * cell.recovered).toFixed(1)}%`.replace("-", "−");
        row.append(
          word, element("td", cell.side), element("td", cell.layer, "n"), element("td", show(cell.effect), "n"),
          element("td", share, "n"),
        );
        return row;
      }),
    );
  }

  prefersDark.addEventListener("change", () => setTheme(prefersDark.matches ? "dark" : "light"));
  button.addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
  setTheme(prefersDark.matches ? "dark" : "light");
  choose(Math.max(0, pairs.findIndex((pair) => pair.sweep)));
  open(tabs.some((tab) => tab.id === "tab-" + location.hash.slice(1)) ? location.hash.slice(1) : "overview");
})();
