/* What the page does beyond showing: sorting, values under the pointer or the focus, the precision map, the chooser.
   No framework, no network. Without it everything but the precision map and the chooser is there all the same. */
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const make = (tag, text, attributes = {}) => {
  const made = document.createElement(tag);
  if (text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};

/* --- arrow keys among many: one of them is in the tab order --- */
const roving = (items, step) => {
  items.forEach((one, i) => one.setAttribute("tabindex", i ? "-1" : "0"));
  return (event, at) => {
    const to = step(event.key, at);
    if (to === null || !items[to]) return;
    event.preventDefault();
    items[at].setAttribute("tabindex", "-1");
    items[to].setAttribute("tabindex", "0");
    items[to].focus();
  };
};

/* --- sortable tables --- */
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  const key = (row, column) => {
    const cell = row.cells[column];
    const text = cell.dataset.sort ?? cell.textContent.trim();
    return cell.dataset.sort === "" ? null : heads[column].dataset.kind === "number" ? Number(text) : text;
  };
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (button) button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.hasAttribute("aria-sort") && other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [key(a, column), key(b, column)];
        if (x === null || y === null) return (x === null) - (y === null);  // what was not measured stays below
        const order = typeof x === "number" ? x - y : x.localeCompare(y, "en", { numeric: true });
        return up ? order : -order;
      });
      body.append(...rows);
    });
  });
}

/* --- values of a chart's marks --- */
const tip = $("tip");
const showTip = (mark) => {
  tip.textContent = mark.getAttribute("aria-label");
  tip.hidden = false;
  const box = mark.getBoundingClientRect();
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(4, Math.min(box.left + box.width / 2 + 12, room)) + window.scrollX}px`;
  const above = box.top - tip.offsetHeight - 8;
  tip.style.top = `${(above > 0 ? above : box.bottom + 8) + window.scrollY}px`;
};
for (const chart of document.querySelectorAll("svg.chart")) {
  const marks = [...chart.querySelectorAll(".mark")];
  const ends = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const move = roving(marks, (key, at) =>
    key in ends ? (at + ends[key] + marks.length) % marks.length : key === "Home" ? 0 : key === "End" ? marks.length - 1 : null);
  marks.forEach((mark, at) => {
    mark.querySelector("title")?.remove();
    for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, () => showTip(mark));
    for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, () => { tip.hidden = true; });
    mark.addEventListener("keydown", (event) => {
      if (event.key === "Escape") tip.hidden = true;
      move(event, at);
    });
  });
}

/* --- precision map --- */
const colour = (bits) => "b" + (bits < 1.8 ? 1 : bits < 2.8 ? 2 : bits < 3.8 ? 3 : bits < 4.8 ? 4 : bits < 5.8 ? 5 : bits < 7 ? 6 : bits < 12 ? 8 : 16);
const size = (bytes) => bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : bytes >= 1e6 ? `${(bytes / 1e6).toFixed(2)} MB` : `${(bytes / 1e3).toFixed(1)} kB`;
const tensorsOf = (file) => {
  const names = data.layouts[file.layout];
  return names.map(([name, role, layer, shape], i) => {
    const type = data.types[file.types.charCodeAt(i) - 48];
    const weights = shape.reduce((a, b) => a * b, 1);
    return { name, role, layer, shape, type: type[0], bytes: weights / type[1] * type[2], weights };
  });
};
const drawMap = (file) => {
  const groups = new Map();
  for (const one of tensorsOf(file)) {
    const where = `${one.role}|${one.layer ?? ""}`;
    if (!groups.has(where)) groups.set(where, []);
    groups.get(where).push(one);
  }
  const all = [...groups.values()].flat();
  const layers = [...new Set(all.map((one) => one.layer))].sort((a, b) => (a === null) - (b === null) || a - b);
  const roles = data.roles.filter((role) => all.some((one) => one.role === role));
  const head = make("tr", null);
  head.append(make("td", null));
  layers.forEach((layer) => head.append(make("th", layer ?? "none", { scope: "col" })));
  const table = make("table", null, { class: "map", role: "grid", "aria-label": `Bits per weight of ${file.label}, by role and layer` });
  table.append(make("caption", "Whole bits per weight; columns are layers, “none” is outside of them. Arrow keys move, Enter shows the tensors."));
  table.append(make("thead", null), make("tbody", null));
  table.tHead.append(head);
  const buttons = [], places = [];
  roles.forEach((role, y) => {
    const row = make("tr", null);
    row.append(make("th", role.replaceAll("_", " "), { scope: "row" }));
    layers.forEach((layer, x) => {
      const cell = make("td", null, { role: "gridcell" });
      const members = groups.get(`${role}|${layer ?? ""}`);
      if (members) {
        const bytes = members.reduce((a, one) => a + one.bytes, 0);
        const bits = 8 * bytes / members.reduce((a, one) => a + one.weights, 0);
        const types = [...new Set(members.map((one) => one.type))].join(", ");
        const where = layer === null ? "outside of layers" : `layer ${layer}`;
        const button = make("button", bits < 10 ? Math.floor(bits) : "F", {
          type: "button", class: colour(bits), "aria-label": `${role.replaceAll("_", " ")}, ${where}: ${bits.toFixed(2)} bits, ${types}` });
        button.addEventListener("click", () => showCell(file, role, where, members, bits, bytes));
        button.title = button.getAttribute("aria-label");
        buttons.push(button);
        places.push([x, y]);
        cell.append(button);
      }
      row.append(cell);
    });
    table.tBodies[0].append(row);
  });
  const at = (x, y) => places.findIndex(([a, b]) => a === x && b === y);
  const look = (from, dx, dy) => {
    for (let [x, y] = places[from]; ;) {
      x += dx; y += dy;
      if (x < 0 || y < 0 || x >= layers.length || y >= roles.length) return null;
      if (at(x, y) >= 0) return at(x, y);
    }
  };
  const steps = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  const move = roving(buttons, (key, from) => key in steps ? look(from, ...steps[key]) : null);
  buttons.forEach((button, i) => button.addEventListener("keydown", (event) => move(event, i)));
  $("map").replaceChildren(table);
  $("cell").replaceChildren(make("p", "No cell chosen.", { class: "soft" }));
};
const showCell = (file, role, where, members, bits, bytes) => {
  const table = make("table", null);
  table.append(make("caption", `${file.label}: ${role.replaceAll("_", " ")}, ${where}; ${bits.toFixed(3)} bits per weight, ${size(bytes)}`));
  const head = make("tr", null);
  for (const title of ["tensor", "type", "bits", "shape", "size"]) head.append(make("th", title, { scope: "col", class: "left" }));
  table.append(make("thead", null), make("tbody", null));
  table.tHead.append(head);
  for (const one of members) {
    const row = make("tr", null);
    row.append(make("th", one.name, { scope: "row", class: "mono" }));
    for (const text of [one.type, (8 * one.bytes / one.weights).toFixed(3), one.shape.join(" × "), size(one.bytes)]) row.append(make("td", text, { class: "left" }));
    table.tBodies[0].append(row);
  }
  $("cell").replaceChildren(table);
};
if ($("map-file")) {
  $("map-file").addEventListener("change", (event) => drawMap(data.maps[event.target.value]));
  $("map-file").selectedIndex = Math.floor(data.maps.length / 2);  // the largest file is the dullest
  drawMap(data.maps[$("map-file").selectedIndex]);
}

/* --- which file should I take? The rules of choose.py: lowest value of those that fit --- */
const gigabytes = (bytes) => (bytes / 1e9).toFixed(2);
const choose = () => {
  const c = data.chooser;
  const vram = Number($("vram").value) * Number($("unit").value);
  const at = $("ctx").selectedIndex, kind = $("kv").selectedIndex;
  const rows = c.files.map((file, i) => {
    const kv = file.kv ? file.kv[kind][at] : 0;
    const compute = file.compute[at];
    const total = kv === null ? Infinity : file.bytes + kv + compute;  // a cache type that this model cannot have
    return { i, ...file, kv, compute, counted: Boolean(file.kv), total };
  });
  const fitting = rows.filter((one) => one.total <= vram);
  const best = fitting[0];  // files come in order of the metric
  const table = $("fits").tBodies[0];
  table.replaceChildren(...rows.map((one) => {
    const row = make("tr", null);
    row.append(make("th", one.label, { scope: "row" }));
    const numbers = [gigabytes(one.bytes), one.kv === null ? "impossible" : one.counted ? gigabytes(one.kv) : "unknown", gigabytes(one.compute), Number.isFinite(one.total) ? gigabytes(one.total) : "impossible"];
    for (const text of [...numbers, one.shown, one.total <= vram ? "yes" : "no"]) row.append(make("td", text));
    return row;
  }));
  let text;
  if (!best) {
    const least = rows.reduce((a, b) => (a.total < b.total ? a : b));
    text = `No measured file fits; the smallest, ${least.label}, takes ${gigabytes(least.total)} GB.`;
  } else {
    text = `${best.label}: ${c.lowest} of the ${fitting.length} that fit, ${best.shown}; takes ${gigabytes(best.total)} GB.`;
    const ties = best.ties.filter((i) => rows[i].total <= vram).map((i) => rows[i].label);
    if (ties.length) text += ` No difference could be shown to ${ties.join(", ")}.`;
    if (!c.tested) text += " Of so many files differences were not tested here; apex which tests them.";
    if (!best.counted) text += " Its KV cache is not counted: no GGUF of this model was at hand.";
  }
  $("choice").textContent = text;
};
if ($("chooser")) {
  $("chooser").addEventListener("input", choose);
  $("chooser").addEventListener("submit", (event) => event.preventDefault());
  choose();
}

/* Paper has no closed details. */
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => {
  one.dataset.was = one.open ? "open" : "";
  one.open = true;
}));
window.addEventListener("afterprint", () => document.querySelectorAll("details").forEach((one) => { one.open = one.dataset.was === "open"; }));
