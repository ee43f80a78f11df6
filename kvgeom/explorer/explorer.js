// The explorer: layers, the channels of one, prompts, and both responses to one, linked. No library, no network.
// All text of models goes in as text nodes, never as markup.

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

function draw(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const unpacked = new Map(); // each matrix is unpacked once

function floats(packed) {
  if (!unpacked.has(packed)) {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    unpacked.set(packed, new Float32Array(bytes.buffer));
  }
  return unpacked.get(packed);
}

function short(value) {
  if (value === null) return "";
  const size = Math.abs(value);
  if (size >= 1e6 || (size < 0.01 && size > 0)) return value.toExponential(0);
  if (size >= 1e4) return `${Math.round(value / 1000)}k`;
  return size >= 10 || Number.isInteger(value) ? String(Math.round(value)) : value.toFixed(size >= 1 ? 1 : 2);
}

// Where a value lies on its column's scale, from 0 to 1.
function shade(column, value) {
  const of = (x) => (column.scale === "log" ? Math.log10(Math.max(x, 1e-12)) : x);
  const known = column.values.filter((x) => x !== null && (column.scale !== "log" || x > 0)).map(of);
  const low = column.scale === "log" ? Math.min(...known) : 0;
  const high = Math.max(...known);
  return high > low ? Math.min(1, Math.max(0, (of(value) - low) / (high - low))) : 0;
}

function colours(share) {
  const mix = (from, to) => Math.round(from + (to - from) * share);
  const parts = [mix(240, 165), mix(243, 38), mix(246, 20)];
  const light = parts.map((x) => x / 255).map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * light[0] + 0.7152 * light[1] + 0.0722 * light[2];
  // Whichever ink has more contrast: that of white is 1.05 / (L + 0.05), of black (L + 0.05) / 0.05.
  return { back: `rgb(${parts.join(",")})`, ink: luminance > 0.179 ? "#000" : "#fff" };
}

function commonStart(one, other) {
  const a = Array.from(one), b = Array.from(other);
  let at = 0;
  while (at < a.length && at < b.length && a[at] === b[at]) at += 1;
  return [a, b, at];
}

function render({ model, el }) {
  const content = model.get("content");
  const state = { layer: content.layers[0] ?? null, site: "k", channel: null, recipe: content.recipes[0]?.name ?? "", prompt: content.prompts[0]?.index ?? null };
  const asked = {}; // answers that came while one was looking, by cache and prompt
  const root = make("section", { class: "kvx", "aria-label": "kvgeom explorer" });
  const map = make("div", { class: "panel" }), channels = make("div", { class: "panel" }), prompts = make("div", { class: "panel wide" });
  const heading = make("h2", {}, content.model || "kvgeom");
  root.append(heading, make("div", { class: "panels" }, ...(content.layers.length ? [map, channels] : []), ...(content.prompts.length ? [prompts] : [])));
  el.replaceChildren(root);

  function choose(change) {
    const before = document.activeElement?.dataset?.key;
    Object.assign(state, change);
    showMap();
    showChannels();
    showPrompts();
    if (before) root.querySelector(`[data-key="${CSS.escape(before)}"]`)?.focus();
  }

  function showMap() {
    const head = make("tr", {}, make("th", { scope: "col" }, "layer"), ...content.columns.map((column) => make("th", { scope: "col", title: column.note }, column.name)));
    const rows = content.layers.map((layer, at) => make("tr", {}, make("th", { scope: "row" }, String(layer)), ...content.columns.map((column) => {
      const value = column.values[at];
      const { back, ink } = value === null ? { back: "transparent", ink: "inherit" } : colours(shade(column, value));
      const said = value === null ? "undefined" : `${column.marks[at]} ${short(value)}`.trim();
      const pressed = state.layer === layer && (column.site === "" ? false : state.site === column.site);
      return make("td", {}, make("button", {
        class: "cell", type: "button", style: `background:${back};color:${ink}`, "data-key": `${layer} ${column.name}`,
        "aria-pressed": String(pressed), "aria-label": `layer ${layer}, ${column.name}: ${said}`, title: `layer ${layer}, ${column.name}: ${said}`,
        on: {
          click: () => choose({
            layer, channel: null, site: column.site || state.site,
            recipe: content.recipes.find((each) => each.layer === layer)?.name ?? state.recipe,
          }),
          keydown: (event) => move(event, at, content.columns.indexOf(column)),
        },
      }, value === null ? "·" : `${column.marks[at] ? "≥" : ""}${short(value)}`));
    })));
    map.replaceChildren(make("h3", {}, "Layers"), make("p", {}, "Point at a cell: its channels, and what rounding this layer alone does to responses. Darker is more."),
      make("div", { class: "scroll" }, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))));
  }

  function move(event, row, column) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    const layer = content.layers[row + step[0]], other = content.columns[column + step[1]];
    if (layer === undefined || !other) return;
    event.preventDefault();
    root.querySelector(`[data-key="${CSS.escape(`${layer} ${other.name}`)}"]`)?.focus();
  }

  function showChannels() {
    const own = content.channels[state.site];
    const name = { k: "keys", v: "values", resid: "residual stream" }[state.site];
    if (!own) {
      channels.replaceChildren(make("h3", {}, `Layer ${state.layer}, ${name}`), make("p", {}, "Channels are kept of keys and values."));
      return;
    }
    const at = content.layers.indexOf(state.layer) * own.count;
    const part = (values) => floats(values).subarray(at, at + own.count);
    const magnitude = part(own.magnitude), noise = part(own.noise), loading = part(own.loading);
    const usable = [...magnitude.keys()].filter((n) => magnitude[n] > 0 && Number.isFinite(loading[n]));
    const border = own.outliers[content.layers.indexOf(state.layer)];
    const width = 560, height = 300, left = 46, bottom = 34, top = 8, right = 10;
    const logs = usable.map((n) => Math.log10(magnitude[n]));
    const low = Math.min(...logs), high = Math.max(...logs), most = Math.max(...usable.map((n) => loading[n]), 1e-12);
    const x = (value) => left + (high > low ? (Math.log10(value) - low) / (high - low) : 0.5) * (width - left - right);
    const y = (value) => height - bottom - (value / most) * (height - bottom - top);
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `channels of the ${name} of layer ${state.layer}: magnitude against share of the class difference` });
    picture.append(draw("line", { class: "axis", x1: left, y1: height - bottom, x2: width - right, y2: height - bottom }), draw("line", { class: "axis", x1: left, y1: top, x2: left, y2: height - bottom }));
    if (border && Math.log10(border) >= low && Math.log10(border) <= high) picture.append(draw("line", { class: "guide", x1: x(border), x2: x(border), y1: top, y2: height - bottom }));
    for (const end of [10 ** low, 10 ** high]) if (Number.isFinite(end)) picture.append(draw("text", { x: x(end), y: height - bottom + 14, "text-anchor": end === 10 ** low ? "start" : "end" }, short(end)));
    picture.append(draw("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, "magnitude (rms, log)"),
      draw("text", { x: left - 4, y: top + 10, "text-anchor": "end" }, `${(100 * most).toFixed(most < 0.1 ? 1 : 0)} %`), draw("text", { x: left - 4, y: height - bottom, "text-anchor": "end" }, "0 %"));
    const size = own.count / own.heads;
    const palette = ["#3f6f9e", "#d98a29", "#4c9a6a", "#8a60a8", "#c4587c", "#3fa0b3", "#8a6b4a", "#6b7680"];
    for (const n of usable) {
      const said = `channel ${n} (KV head ${Math.floor(n / size)}): magnitude ${short(magnitude[n])}, noise ${short(noise[n])}, ${(100 * loading[n]).toFixed(1)} % of the class difference`;
      const dot = draw("circle", { cx: x(magnitude[n]), cy: y(loading[n]), r: 4, fill: palette[Math.floor(n / size) % palette.length], class: n === state.channel ? "on" : "" }, draw("title", {}, said));
      dot.addEventListener("click", () => choose({ channel: n }));
      picture.append(dot);
    }
    const chosen = state.channel === null ? usable.reduce((best, n) => (best === null || loading[n] > loading[best] ? n : best), null) : state.channel;
    const line = chosen === null ? "nothing is known of its channels" : `${state.channel === null ? "largest share: " : ""}channel ${chosen}, KV head ${Math.floor(chosen / size)}: magnitude ${short(magnitude[chosen])}${border && magnitude[chosen] >= border ? " (an outlier)" : ""}, noise ${short(noise[chosen])}, ${(100 * loading[chosen]).toFixed(1)} % of the class difference`;
    channels.replaceChildren(make("h3", {}, `Channels of the ${name} of layer ${state.layer}`),
      make("p", {}, "Up: the share of the difference between harmful and harmless requests. Right of the dotted line: outliers, which set the scale that others share."),
      picture, make("p", { "aria-live": "polite", class: "said" }, line));
  }

  function answerOf(prompt) {
    return asked[`${state.recipe}\n${prompt.index}`] ?? prompt.answers[state.recipe] ?? null;
  }

  function showPrompts() {
    if (!content.prompts.length) return;
    const groups = {};
    for (const each of content.recipes) (groups[each.group] ??= []).push(each);
    const typed = [...new Set(Object.keys(asked).map((key) => key.split("\n")[0]))];
    if (typed.length) groups["asked now"] = typed.map((name) => ({ name, about: name }));
    const select = make("select", { "data-key": "recipe", on: { change: (event) => choose({ recipe: event.target.value }) } }, ...Object.entries(groups).map(([group, members]) =>
      make("optgroup", { label: group }, ...members.map((each) => make("option", { value: each.name, ...(each.name === state.recipe ? { selected: "" } : {}) }, each.name)))));
    const answers = content.prompts.map(answerOf);
    const known = answers.filter(Boolean);
    const lost = known.filter((answer) => answer.label !== "refused").length;
    const about = content.recipes.find((each) => each.name === state.recipe)?.about ?? state.recipe;
    const list = make("ul", {}, ...content.prompts.map((prompt, at) => make("li", {}, make("button", {
      type: "button", "data-key": `prompt ${prompt.index}`, "aria-pressed": String(prompt.index === state.prompt), on: { click: () => choose({ prompt: prompt.index }) },
    }, make("span", { class: `chip ${answers[at] && answers[at].label !== "refused" ? "lost" : ""}` }, answers[at]?.label ?? "not asked"), make("span", {}, prompt.request)))));
    const prompt = content.prompts.find((each) => each.index === state.prompt) ?? content.prompts[0];
    const controls = [make("label", {}, "cache", select)];
    if (model.get("live")) controls.push(...liveControls(prompt));
    prompts.replaceChildren(make("h3", {}, "Requests that the model refuses with an exact cache"),
      make("div", { class: "controls" }, ...controls), make("p", { "aria-live": "polite", class: "count" }, `${lost} of ${known.length} lost. ${about}`),
      make("div", { class: "prompts" }, make("div", { class: "scroll" }, list), sides(prompt)));
  }

  function sides(prompt) {
    const other = answerOf(prompt);
    if (!other) return make("div", {}, make("p", {}, "This request was not asked under this cache."));
    const [before, after, at] = commonStart(prompt.exact.text, other.text);
    const body = (letters) => {
      const box = make("div", { class: "answer" }, letters.slice(0, at).join(""));
      if (at < letters.length) box.append(make("mark", {}, letters.slice(at).join("")));
      return box;
    };
    const margin = (answer) => (answer.margin === null ? "" : `, margin ${answer.margin.toFixed(2)} nats`);
    const where = other.divergence < 0 ? "the same response, as far as it was read" : `the first token that differs is number ${other.divergence + 1}`;
    return make("div", {}, make("h3", {}, prompt.request), make("div", { class: "answers" },
      make("div", {}, make("h3", {}, `exact cache: ${prompt.exact.label}${margin(prompt.exact)}`), body(before)),
      make("div", {}, make("h3", { class: other.label === "refused" ? "" : "lost" }, `${state.recipe}: ${other.label}${margin(other)}`), body(after))),
      make("p", {}, `${where}; ${other.label} because ${other.reason}`));
  }

  function liveControls(prompt) {
    const input = make("input", { "data-key": "scheme", value: state.scheme ?? "int4-asym-token", size: "24", on: { input: (event) => { state.scheme = event.target.value; } } });
    const said = make("span", { role: "status" }, state.said ?? "");
    const go = make("button", { type: "button", "data-key": "ask", on: { click: () => {
      state.said = "the model is asked ...";
      said.textContent = state.said;
      model.send({ kind: "ask", prompt: prompt.index, scheme: input.value });
    } } }, "ask the model");
    return [make("label", {}, "another cache, for the request below", input), go, said];
  }

  model.on("msg:custom", (message) => {
    if (message.kind === "answer") {
      asked[`${message.scheme}\n${message.prompt}`] = message.answer;
      state.said = "";
      choose({ recipe: message.scheme, prompt: message.prompt });
    } else if (message.kind === "error") {
      choose({ said: message.text });
    }
  });
  const first = content.prompts.find((prompt) => (answerOf(prompt)?.label ?? "refused") !== "refused");
  choose({ prompt: first?.index ?? state.prompt });
}

export default { render };
