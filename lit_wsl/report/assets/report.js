"use strict";
// Both trees, folded and virtualised, with lines between them. Every name reaches the page as text, never as markup.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const ROW = 24, MARGIN = 12, $ = (id) => document.getElementById(id);
  const MARKS = { matched: "✓", part: "◐", ambiguous: "?", unmatched: "✕", excluded: "–" };
  const entries = data.entries.map((e, i) => ({ i, s: e[0], t: e[1], badge: data.badges[e[2]], score: e[3], margin: e[4], reason: data.texts[e[5]], pairs: e[6], lossy: e[7] === 1 }));
  const level = (score) => (score > 0.8 ? "high" : score >= 0.6 ? "medium" : "low");
  const plain = (entry) => entry.badge === "exact" || entry.badge === "cast";
  const number = (n) => { for (const [u, v] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) if (n >= v) return (n / v).toFixed(1) + " " + u; return String(n); };
  const percent = (share) => (share >= 1 || share <= 0 ? (100 * share).toFixed(1) : Math.min(99.9, Math.max(0.1, 100 * share)).toFixed(1)) + "%";
  function el(tag, options, ...children) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(options || {})) {
      if (key === "text") node.textContent = value; else if (key === "class") node.className = value;
      else if (key.startsWith("on")) node.addEventListener(key.slice(2), value); else node.setAttribute(key, value);
    }
    node.append(...children.filter((c) => c !== null && c !== undefined));
    return node;
  }
  // text whose names may be broken behind their dots, so that words stay whole where there is room for them
  const breakable = (text) => el("span", {}, ...text.split(/(?<=[.])/).flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part])));

  // ---- tensors: what each side holds, and where each tensor goes -------------------------------------------------
  function makeSide(key) {
    const raw = data[key], n = raw.names.length;
    const side = { key, names: raw.names, shape: raw.shapes.map((s) => data.shapes[s][0]), size: raw.shapes.map((s) => data.shapes[s][1]), buffer: raw.buffers,
      type: raw.types || [], partners: Array.from({ length: n }, () => []), status: new Array(n).fill("unmatched"), why: {}, nearest: {}, advice: {}, cases: {}, pass: new Uint8Array(n).fill(1) };
    side.isBuffer = new Uint8Array(n);
    for (const b of side.buffer) side.isBuffer[b] = 1;
    for (const [i, text, nearest, advice] of raw.unmatched) { side.why[i] = data.texts[text]; if (nearest !== null) side.nearest[i] = nearest; if (advice !== null) side.advice[i] = data.texts[advice]; }
    for (const b of raw.excluded) side.status[b] = "excluded";
    return side;
  }
  const source = makeSide("source"), target = makeSide("target"), sides = { source, target };
  source.other = target; target.other = source;
  for (const e of entries) {
    for (const s of e.s) { source.partners[s].push(e.i); source.status[s] = "matched"; }
    for (const t of e.t) { target.partners[t].push(e.i); target.status[t] = "matched"; }
  }
  data.ambiguous.forEach((c) => c.t.forEach((t) => { if (target.status[t] !== "matched") { target.status[t] = "ambiguous"; (target.cases[t] = target.cases[t] || []).push(c); } }));
  data.ambiguous.forEach((c) => c.c.forEach(([list]) => list.forEach((s) => { if (source.status[s] === "unmatched") source.status[s] = "ambiguous"; })));

  // ---- trees: built once per side and folding --------------------------------------------------------------------
  // what a name is without its only number, which neighbours may differ by; null where it has none, or several
  const stem = (label) => { const found = /^(\D*)\d+(\D*)$/.exec(label); return found && found[1] + "#" + found[2]; };
  const numberOf = (label) => Number(/\d+/.exec(label)[0]);
  function ranges(values) {
    const runs = [];
    for (const v of values) { const last = runs[runs.length - 1]; if (last && v === last[1] + 1) last[1] = v; else runs.push([v, v]); }
    return "{" + runs.map(([a, b]) => (a === b ? a : a + ".." + b)).join(",") + "}";
  }
  function plainTree(side) {
    const root = { label: data.labels[side.key], children: [], tensor: -1, key: "" }, seen = new Map([["", root]]);
    side.names.forEach((name, i) => {
      const parts = name.split("."); let path = "", node = root;
      for (let d = 0; d < parts.length - 1; d++) {
        path += parts[d] + ".";
        let next = seen.get(path);
        if (!next) { next = { label: parts[d], children: [], tensor: -1, key: path }; seen.set(path, next); node.children.push(next); }
        node = next;
      }
      node.children.push({ label: parts[parts.length - 1], children: [], tensor: i, key: name });
    });
    return root;
  }
  function sign(node, side, known) {
    const inner = node.tensor >= 0 ? side.shape[node.tensor] + "|" + side.status[node.tensor] + "|" + (side.isBuffer[node.tensor] ? "b" : "p")
      : node.children.map((c) => c.label + ":" + sign(c, side, known)).join(";");
    if (!known.has(inner)) known.set(inner, known.size);
    node.sign = known.get(inner);
    return node.sign;
  }
  // A layer has modules of its own. Alike siblings without any (fc1 and fc2, the 0 and 2 of a Sequential) are parts of
  // a block, each with its own role; a list of them at the top still folds.
  const isLayer = (node, inBlock) => node.tensor < 0 && (node.children.some((c) => c.tensor < 0) || (!inBlock && /^\d+$/.test(node.label)));
  function display(group, side, depth, parent, folded, inBlock) {
    // one shown node for a group of alike nodes (a group of one where nothing is folded)
    const first = group[0], labels = group.map((g) => g.label);
    const node = { label: first.label, times: group.length, depth, parent, children: [], leaf: first.tensor >= 0, tensors: [], key: first.key, open: false, side };
    if (group.length > 1) { const set = [...new Set(labels)]; if (set.length > 1) node.label = stem(set[0]).replace("#", ranges(set.map(numberOf))); }
    if (node.leaf) { node.tensors = group.map((g) => g.tensor); return node; }
    for (let k = 0; k < first.children.length;) {
      let end = k + 1;
      const head = first.children[k];
      if (folded && stem(head.label) !== null && isLayer(head, inBlock)) while (end < first.children.length && stem(first.children[end].label) === stem(head.label) && first.children[end].sign === head.sign && (head.tensor >= 0) === (first.children[end].tensor >= 0)) end++;
      const below = [];
      for (const g of group) for (let j = k; j < end; j++) below.push(g.children[j]);
      const child = display(below, side, depth + 1, node, folded, inBlock || end - k > 1);
      if (end - k > 1) child.label = stem(head.label).replace("#", ranges(first.children.slice(k, end).map((c) => numberOf(c.label))));
      else child.label = head.label;
      node.children.push(child);
      for (const t of child.tensors) node.tensors.push(t);
      k = end;
    }
    return node;
  }
  function compact(node, depth) {
    // a module with one child says no more than the child: encoder.layer.{0..11}
    node.depth = depth;
    node.children = node.children.map((c) => compact(c, depth + 1));
    if (!node.parent || node.children.length !== 1) return node;
    const child = node.children[0];
    child.label = node.label + "." + child.label; child.parent = node.parent;
    return child.leaf ? Object.assign(child, { depth }) : raise(child);
  }
  function raise(node) { node.depth--; node.children.forEach(raise); return node; }
  function buildTree(side, folded) {
    const root = plainTree(side);
    sign(root, side, new Map());
    side.root = compact(display([root], side, 0, null, folded, false), 0);
    side.root.open = true;
    const index = (node) => { node.has = new Set(node.tensors); node.children.forEach(index); };
    index(side.root);
    // open level by level while it fits a screen
    let level = [side.root], rows = 1 + side.root.children.length;
    while (level.length) {
      const next = level.flatMap((n) => n.children.filter((c) => !c.leaf)), more = next.reduce((sum, n) => sum + n.children.length, 0);
      if (!next.length || rows + more > 36) break;
      next.forEach((n) => { n.open = true; });
      rows += more; level = next;
    }
  }
  function measure(node) {
    // elements and status of what the filter lets through; children first
    if (node.leaf) node.shown = node.tensors.filter((t) => node.side.pass[t]);
    else { node.shown = []; for (const c of node.children) { measure(c); for (const t of c.shown) node.shown.push(t); } }
    let all = 0, hit = 0, asked = 0, left = 0, unsure = 0, matched = 0, worst = 2;
    for (const t of node.shown) {
      const status = node.side.status[t];
      all += node.side.size[t];
      if (status === "excluded") { left++; continue; }
      asked++;
      if (status === "matched") { matched++; hit += node.side.size[t]; for (const e of node.side.partners[t]) worst = Math.min(worst, entries[e].score); }
      if (status === "ambiguous") unsure++;
    }
    node.share = all ? hit / all : asked ? matched / asked : 1;
    node.worst = worst;
    // without its buffers a module is not loaded in full
    node.status = !asked ? "excluded" : matched === asked && !left ? "matched" : matched ? "part" : unsure ? "ambiguous" : "unmatched";
  }

  // ---- filter ----------------------------------------------------------------------------------------------------
  const CHIPS = [["all", "All", () => true],
    ["doubtful", "Doubtful", (e) => e && e.score <= 0.8], ["transformed", "Transformed", (e) => e && !plain(e)],
    ["ambiguous", "Ambiguous", null], ["unmatched", "Unmatched", null]];
  const state = { query: "", chip: "all", operation: "", buffers: true, fold: true, selected: null, entry: -1 };
  const filtering = () => state.query !== "" || state.chip !== "all" || state.operation !== "";
  // A term is whole path parts ("layer.1", "fc.weight") where some name has them, else any part of a name: "layer.1"
  // does not list layer.10, and "conv" still finds conv1.
  const whole = new Map();
  function matcher(term) {
    if (!whole.has(term)) {
      const dotted = "." + term + ".", has = (n) => ("." + n.toLowerCase() + ".").includes(dotted);
      whole.set(term, source.names.some(has) || target.names.some(has));
    }
    const dotted = "." + term + ".";
    return whole.get(term) ? (name, more) => ("." + name.toLowerCase() + ".").includes(dotted) || more.includes(term) : (name, more) => name.toLowerCase().includes(term) || more.includes(term);
  }
  const asked = (side, t) => state.buffers || !side.isBuffer[t];
  function listed(chip, tests, mark) {
    // how many mappings and tensors a chip lists, for the terms of the search; mark is called for every tensor of them
    const [, , wanted] = CHIPS.find((c) => c[0] === chip);
    let found = 0;
    for (const side of [source, target]) for (let t = 0; t < side.names.length; t++) {
      const status = side.status[t];
      if (status === "matched" || state.operation || !asked(side, t) || (chip !== "all" && chip !== status) || (chip === "ambiguous" && side === source)) continue;
      if (tests.every((test) => test(side.names[t], side.shape[t]))) { found++; mark(side, t); }
    }
    if (wanted) for (const e of entries) {
      if (!wanted(e) || (state.operation && e.badge !== state.operation)) continue;
      const all = [...e.s.map((t) => [source, t]), ...e.t.map((t) => [target, t])];
      if (!all.some(([side, t]) => asked(side, t)) || !tests.every((test) => all.some(([side, t]) => test(side.names[t], side.shape[t] + " " + e.badge)))) continue;
      found++; all.forEach(([side, t]) => { if (asked(side, t)) mark(side, t); });
    }
    return found;
  }
  function applyFilter() {
    const tests = state.query.toLowerCase().split(/\s+/).filter(Boolean).map(matcher);
    for (const side of [source, target]) side.pass.fill(0);
    const found = listed(state.chip, tests, (side, t) => { side.pass[t] = 1; });
    if (state.chip === "ambiguous") for (const c of data.ambiguous) if (c.t.some((t) => target.pass[t])) for (const [names] of c.c) for (const s of names) if (asked(source, s)) source.pass[s] = 1;
    $("found").textContent = filtering() ? found + (found === 1 ? " match" : " matches") : "";
    document.querySelectorAll("#chips button").forEach((b) => { if (b.dataset.chip !== "all") b.textContent = b.dataset.label + " " + listed(b.dataset.chip, tests, () => {}); });
    for (const side of [source, target]) { measure(side.root); side.auto = filtering() && side.root.shown.length <= 600; }
    layout();
  }

  // ---- rows ------------------------------------------------------------------------------------------------------
  function layout() {
    for (const side of [source, target]) {
      side.rows = []; side.rowOf = new Int32Array(side.names.length).fill(-1);
      const visit = (node) => {
        if (!node.shown.length) return;
        const row = side.rows.length, open = !node.leaf && (node.open || side.auto);
        side.rows.push(node); node.row = row; node.isOpen = open;
        if (open) {
          const shown = node.children.filter((c) => c.shown.length);
          shown.forEach((c, i) => { c.position = i + 1; c.siblings = shown.length; visit(c); });
        } else for (const t of node.shown) side.rowOf[t] = row;
      };
      visit(side.root);
      side.box.querySelector(".spacer").style.height = side.rows.length * ROW + "px";
      if (side.active >= side.rows.length) side.active = 0;
    }
    links = new Map();
    for (const e of entries) for (const s of e.s) for (const t of e.t) {
      const a = source.rowOf[s], b = target.rowOf[t];
      if (a < 0 || b < 0) continue;
      const key = a * 1e6 + b, old = links.get(key);
      if (old) { old.score = Math.min(old.score, e.score); old.transformed = old.transformed || !plain(e); old.entries.push(e.i); }
      else links.set(key, { a, b, score: e.score, transformed: !plain(e), entries: [e.i] });
    }
    draw();
  }
  let links = new Map(), pending = false;
  function draw() { if (!pending) { pending = true; requestAnimationFrame(() => { pending = false; drawRows(source); drawRows(target); drawLines(); }); } }
  function drawRows(side) {
    const box = side.box, rows = box.querySelector(".rows"), top = box.scrollTop;
    const from = Math.max(0, Math.floor(top / ROW) - MARGIN), to = Math.min(side.rows.length, Math.ceil((top + box.clientHeight) / ROW) + MARGIN);
    const list = [];
    for (let r = from; r < to; r++) list.push(rowElement(side, side.rows[r], r));
    rows.replaceChildren(...list);
    if (!side.rows.length) rows.append(el("div", { class: "empty", text: "nothing here passes the filter" }));
    box.setAttribute("aria-activedescendant", side.rows.length ? side.key + "-row-" + side.active : "");
  }
  function rowElement(side, node, r) {
    const chosen = state.selected === node, partner = chosenRows(side.other).size && chosenRows(side).has(r) && !chosen;
    const row = el("div", { class: "row " + (node.leaf ? "tensor" : "module") + (chosen ? " selected" : "") + (partner ? " partner" : "") + (r === side.active ? " active" : ""),
      role: "treeitem", id: side.key + "-row-" + r, "aria-level": node.depth + 1, "aria-posinset": node.position || 1, "aria-setsize": node.siblings || 1, "aria-selected": String(chosen), title: title(side, node) });
    if (!node.leaf) row.setAttribute("aria-expanded", String(node.isOpen));
    row.style.top = r * ROW + "px";
    row.style.paddingLeft = 6 + node.depth * 15 + "px";
    const twist = el("span", { class: "twist", "aria-hidden": "true", text: node.leaf ? "" : node.isOpen ? "▼" : "▶" });
    if (!node.leaf) twist.addEventListener("click", (event) => { event.stopPropagation(); toggle(node); });
    row.append(twist, el("span", { class: "mark " + node.status, text: MARKS[node.status], title: node.status }), el("span", { class: "label", text: node.label }));
    if (node.times > 1) row.append(el("span", { class: "times", text: "×" + node.times }));
    const own = node.children.find((c) => c.leaf && !c.label.includes(".")), type = own && side.type[own.tensors[0]];
    if (type) row.append(el("span", { class: "type", text: type }));
    row.append(el("span", { class: "grow" }));
    if (node.leaf) {
      const linked = node.shown.flatMap((t) => side.partners[t]), entry = linked.length ? entries[linked[0]] : null;
      if (side.key === "target" && entry && entry.badge !== "exact") row.append(el("span", { class: "badge" + (entry.lossy ? " lossy" : ""), text: entry.badge + (entry.lossy ? " ⚠" : "") }));
      row.append(el("span", { class: "shape", text: side.shape[node.tensors[0]] }));
    } else if (node.status !== "excluded") {
      const share = el("span", { class: "share", title: percent(node.share) + " of its elements" }, el("i"));
      share.firstChild.style.width = 100 * node.share + "%";
      row.append(share);
    }
    if (side.key === "target" && node.worst <= 1 && !node.isOpen) row.append(el("span", { class: "score " + level(node.worst), text: node.worst.toFixed(2) }));
    row.addEventListener("click", () => { side.active = r; select(node); });
    row.addEventListener("dblclick", () => toggle(node));
    return row;
  }
  const title = (side, node) => (node.leaf ? node.shown.slice(0, 3).map((t) => side.names[t]).join("\n") + (node.shown.length > 3 ? "\n… " + node.shown.length : "") : node.key.replace(/\.$/, "") || node.label);
  function toggle(node) {
    if (node.leaf) return;
    for (const side of [source, target]) if (side.auto) { side.auto = false; openShown(side.root); }
    node.open = !node.isOpen;
    const partner = counterpart(node);
    if (partner) { partner.open = node.open; if (node.open) for (let up = partner.parent; up; up = up.parent) up.open = true; }
    layout();
  }
  function counterpart(node) {
    // the smallest module of the other side that holds all partners, if these are most of what it holds
    const other = node.side.other, tensors = new Set(node.shown.flatMap((t) => node.side.partners[t]).flatMap((e) => (node.side === source ? entries[e].t : entries[e].s)));
    if (!tensors.size || !node.parent) return null;
    let at = other.root;
    for (;;) {
      const inner = at.children.find((c) => !c.leaf && tensors.size <= c.tensors.length && [...tensors].every((t) => c.has.has(t)));
      if (!inner) break;
      at = inner;
    }
    return at.parent && !at.leaf && 2 * tensors.size > at.tensors.length ? at : null;
  }
  function openShown(node) { node.open = !node.leaf && node.shown.length > 0; node.children.forEach(openShown); }

  // ---- lines -----------------------------------------------------------------------------------------------------
  function drawLines() {
    const svg = $("lines"), height = source.box.clientHeight, width = svg.clientWidth, paths = [];
    const span = (side) => [Math.floor(side.box.scrollTop / ROW) - 1, Math.ceil((side.box.scrollTop + height) / ROW)];
    const [a0, a1] = span(source), [b0, b1] = span(target), y = (row, side) => row * ROW + ROW / 2 - side.box.scrollTop;
    const chosen = state.selected || state.entry >= 0 ? chosenRows(source) : null, chosenTarget = chosen ? chosenRows(target) : null;
    for (const link of links.values()) {
      const inA = link.a >= a0 && link.a <= a1, inB = link.b >= b0 && link.b <= b1;
      if (!inA && !inB) continue;
      const y1 = Math.max(-20, Math.min(height + 20, y(link.a, source))), y2 = Math.max(-20, Math.min(height + 20, y(link.b, target)));
      const isChosen = chosen && chosen.has(link.a) && chosenTarget.has(link.b);
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", `M0,${y1} C${width / 2},${y1} ${width / 2},${y2} ${width},${y2}`);
      path.setAttribute("class", level(link.score) + (link.transformed ? " transformed" : "") + (inA && inB ? "" : " away") + (isChosen ? " chosen" : ""));
      paths.push([isChosen ? 1 : 0, path]);
      if (paths.length > 400) break;
    }
    if (state.selected && state.selected.side === target && state.entry < 0) {
      for (const t of state.selected.shown) for (const c of target.cases[t] || []) for (const [list] of c.c) for (const s of list) {
        if (source.rowOf[s] < 0) continue;
        const path = document.createElementNS("http://www.w3.org/2000/svg", "path"), y1 = y(source.rowOf[s], source), y2 = y(target.rowOf[t], target);
        path.setAttribute("d", `M0,${y1} C${width / 2},${y1} ${width / 2},${y2} ${width},${y2}`);
        path.setAttribute("class", "ambiguous candidate chosen");
        paths.push([1, path]);
      }
    }
    paths.sort((p, q) => p[0] - q[0]);
    svg.classList.toggle("choosing", paths.some((p) => p[0]));
    svg.replaceChildren(...paths.map((p) => p[1]));
  }
  function chosenRows(side) {
    // rows of a side that the selection stands for, or that its partners are in
    const rows = new Set();
    const list = state.entry >= 0 ? [state.entry] : state.selected ? state.selected.shown.flatMap((t) => state.selected.side.partners[t]) : [];
    for (const e of list) for (const t of side === source ? entries[e].s : entries[e].t) if (side.rowOf[t] >= 0) rows.add(side.rowOf[t]);
    return rows;
  }

  // ---- selection and details -------------------------------------------------------------------------------------
  function select(node, entry) {
    state.selected = node; state.entry = entry === undefined ? -1 : entry;
    const linked = node.shown.flatMap((t) => node.side.partners[t]);
    if (node.leaf || state.entry >= 0) for (const e of state.entry >= 0 ? [entry] : linked.slice(0, 1)) { entries[e].s.forEach((t) => reveal(source, t)); entries[e].t.forEach((t) => reveal(target, t)); }
    layout();
    requestAnimationFrame(() => { follow(node); draw(); });
    details(node);
  }
  function reveal(side, tensor) {
    const open = (node) => {
      if (!node.has.has(tensor)) return false;
      if (!node.leaf) { node.open = true; node.children.some(open); }
      return true;
    };
    if (side.pass[tensor]) open(side.root);
  }
  function follow(node) {
    // bring the first partner to the height of the selected row
    const other = node.side.other, rows = [...chosenRows(other)].sort((a, b) => a - b);
    if (!rows.length) return;
    const y = node.row * ROW - node.side.box.scrollTop, visible = rows[0] * ROW - other.box.scrollTop;
    if (visible < 0 || visible > other.box.clientHeight - ROW) other.box.scrollTop = rows[0] * ROW - y;
  }
  function details(node) {
    const side = node.side, linked = [...new Set(node.shown.flatMap((t) => side.partners[t]))], panel = $("details"), parts = [];
    if (state.entry >= 0) return panel.replaceChildren(...entryDetails(entries[state.entry], linked.length > 1 ? node : null));
    if (linked.length === 1 && node.leaf) return panel.replaceChildren(...entryDetails(entries[linked[0]], null));
    parts.push(el("h2", { text: (node.leaf ? node.label : node.key.replace(/\.$/, "") || node.label) + (node.times > 1 ? "  ×" + node.times : "") }));
    const elements = node.shown.reduce((sum, t) => sum + side.size[t], 0);
    parts.push(el("p", { class: "muted", text: `${side.key}: ${node.shown.length} tensors, ${number(elements)} elements, ${percent(node.share)} matched by elements` }));
    const rest = node.shown.filter((t) => side.status[t] !== "matched");
    if (linked.length) {
      parts.push(el("h3", { text: `${linked.length} mappings, lowest score first` }));
      const list = el("ul", { class: "pairlist" });
      linked.sort((a, b) => entries[a].score - entries[b].score || a - b).slice(0, 200).forEach((i) => {
        const e = entries[i], button = el("button", { type: "button", onclick: () => select(node, i) },
          el("span", { class: level(e.score), text: e.score.toFixed(2) + " " }), breakable(names(source, e.s) + " → " + names(target, e.t) + " "), plain(e) ? null : el("span", { class: "badge", text: e.badge }));
        list.append(el("li", {}, button));
      });
      parts.push(list);
      if (linked.length > 200) parts.push(el("p", { class: "muted", text: `and ${linked.length - 200} more: open the module, or search` }));
    }
    const kinds = new Map(); // those whose names differ by numbers are told once
    for (const t of rest) { const key = side.names[t].replace(/\d+/g, "#") + side.status[t] + side.why[t], found = kinds.get(key); if (found) found.push(t); else kinds.set(key, [t]); }
    for (const alike of [...kinds.values()].slice(0, 30)) parts.push(...leftover(side, alike[0], alike.length));
    if (kinds.size > 30) parts.push(el("p", { class: "muted", text: `and ${kinds.size - 30} more kinds without a partner` }));
    panel.replaceChildren(...parts);
  }
  const names = (side, list) => list.map((t) => side.names[t]).join(" + ");
  function leftover(side, t, alike) {
    const parts = [el("h3", { class: side.status[t], text: MARKS[side.status[t]] + " " + side.status[t] + (alike > 1 ? " ×" + alike : "") }), el("p", {}, el("code", { text: side.names[t] + "  " + side.shape[t] }))];
    if (side.why[t]) parts.push(el("p", { text: side.why[t] }));
    const closest = side.status[t] === "unmatched" ? near(side, t) : null;
    if (closest) parts.push(closest);
    if (side !== target || !target.cases[t]) return parts;
    for (const reason of new Set(target.cases[t].map((c) => c.reason))) parts.push(el("p", { text: reason }));
    for (const [list, score] of candidates(t).slice(0, 8)) parts.push(el("p", {}, el("span", { class: level(score), text: score.toFixed(2) + " " }), el("code", { text: names(source, list) })));
    if (data.remedy) parts.push(el("p", { class: "advice", text: data.remedy }));
    return parts;
  }
  function entryDetails(e, back) {
    const parts = [];
    if (back) parts.push(el("button", { type: "button", text: "← " + back.label, onclick: () => select(back) }));
    parts.push(el("h3", { text: "source" }), ...e.s.map((s) => el("p", {}, el("code", { text: source.names[s] + "  " + source.shape[s] }))));
    parts.push(el("h3", { text: "target" }), ...e.t.map((t) => el("p", {}, el("code", { text: target.names[t] + "  " + target.shape[t] }))));
    parts.push(el("div", { class: "facts" }, el("span", { class: "big " + level(e.score), text: e.score.toFixed(2) }), el("span", { text: "margin " + e.margin.toFixed(2) }), el("span", { class: "badge", text: e.badge })));
    if (e.lossy) parts.push(el("p", { class: "low", text: "⚠ This operation changes values, as was asked for." }));
    if (e.reason) parts.push(el("p", { text: e.reason }));
    for (const pair of e.pairs || []) {
      parts.push(el("h3", { class: e.pairs.length > 1 ? "names" : "", text: (e.pairs.length > 1 ? source.names[pair[0]] + " → " + target.names[pair[1]] : "score breakdown") }));
      parts.push(breakdown(pair), ...runnerUp(pair[8]));
      if (Math.abs(pair[6] - e.score) > 0.005) parts.push(el("p", { class: "muted", text: `This pair scores ${pair[6].toFixed(2)}; the step, as the mean of its pairs and its family, ${e.score.toFixed(2)}.` }));
    }
    return parts;
  }
  function runnerUp(other) {
    // undefined: not computed; null: there is none
    if (other === undefined) return [];
    if (other === null) return [el("p", { class: "runner", text: "Runner-up: none, no other source has a shape that fits." })];
    const s = other[0], goes = source.partners[s].length ? "goes to " + names(target, entries[source.partners[s][0]].t) : "free";
    return [el("p", { class: "runner" }, el("span", { text: "Runner-up " }), el("span", { class: level(other[5]), text: other[5].toFixed(2) + " " }),
      el("button", { type: "button", class: "name", title: "Show this tensor", onclick: () => openTensor(source, s) }, breakable(source.names[s])), el("span", { class: "muted", text: " " + source.shape[s] + ", " + goes }))];
  }
  function breakdown(pair) {
    const [, , shape, name, hierarchy, details, total, parents, other] = pair, scale = parents === null ? 1 : 0.8, table = el("table", { class: "parts" });
    const rival = other ? other.slice(1) : null, head = ["part", "value", "", "weight", "adds"];
    if (rival) head.push("runner-up");
    table.append(el("tr", {}, ...head.map((text) => el("th", { text }))));
    const line = (label, value, weight, cls, second) => {
      const meter = el("div", { class: cls === "sub" ? "" : level(value) }, el("i"));
      meter.firstChild.style.width = 100 * value + "%";
      table.append(el("tr", { class: cls }, el("td", { text: label }), el("td", { text: value.toFixed(2) }), el("td", { class: "meter" }, meter), el("td", { text: weight === null ? "" : weight.toFixed(2) }), el("td", { text: weight === null ? "" : (weight * value * (cls === "main" ? scale : 1)).toFixed(2) }),
        rival ? el("td", { class: "rival", text: second === null || second === undefined ? "–" : second.toFixed(2) }) : null));
    };
    const sub = (keys, offset) => keys.forEach((key, i) => { const v = details[offset + i]; if (v !== null && v !== undefined) line(key, v, null, "sub", rival && rival[3][offset + i]); });
    line("shape", shape, data.weights[0], "main", rival && rival[0]);
    line("name", name, data.weights[1], "main", rival && rival[1]); sub(data.nameParts, 0);
    line("hierarchy", hierarchy, data.weights[2], "main", rival && rival[2]); sub(data.hierarchyParts, data.nameParts.length);
    if (parents !== null) line("parents match", parents, 0.2, "context", rival && rival[5]);
    line("score", total, null, "total", rival && rival[4]);
    return table;
  }

  // ---- page ------------------------------------------------------------------------------------------------------
  function coverageRow(label, count, side, kind) {
    const bar = el("div", { class: "bar", role: "img", "aria-label": `${label}: ${percent(count.share)} of the elements` });
    const unsure = side.names.reduce((sum, _, t) => sum + (side.status[t] === "ambiguous" && (side.isBuffer[t] === 1) === (kind === "b") ? side.size[t] : 0), 0);
    for (const [cls, part] of [["loaded", count.elements], ["unsure", unsure]]) {
      const piece = el("i", { class: cls }); piece.style.width = (count.of_elements ? (100 * part) / count.of_elements : 0) + "%"; bar.append(piece);
    }
    $("coverage").append(el("span", { class: "name", text: label }), bar, el("span", { text: `${percent(count.share)}  ·  ${number(count.elements)} of ${number(count.of_elements)} elements  ·  ${count.tensors} of ${count.of_tensors} tensors` }));
  }
  function page() {
    $("label-source").textContent = data.labels.source; $("label-target").textContent = data.labels.target;
    const ops = Object.entries(data.counts.operations).map(([badge, n]) => `${n} ${badge}`).join(", ");
    $("counts").textContent = `${entries.length} mappings${ops ? " (" + ops + ")" : ""}  ·  threshold ${data.options.threshold ?? "–"}, ${data.options.strategy ?? "–"}, buffers ${data.options.buffers ?? "–"}  ·  ${data.proof_by || "function"} check: ${data.proof}`;
    coverageRow("source", data.coverage.source, source, "p"); coverageRow("target", data.coverage.target, target, "p");
    if (data.options.buffers !== "exclude" && data.coverage.target_buffers.of_tensors) coverageRow("target buffers", data.coverage.target_buffers, target, "b");
    data.warnings.forEach((text) => $("remarks").append(el("p", { class: "remark warning", text: "⚠ " + text })));
    if (data.notes.length) $("remarks").append(el("details", { class: "remark" }, el("summary", { text: `${data.notes.length} note${data.notes.length > 1 ? "s" : ""}` }), ...data.notes.map((text) => el("p", { text }))));
    for (const side of [source, target]) $("size-" + side.key).textContent = `${side.names.length} tensors, ${number(side.size.reduce((a, b) => a + b, 0))} elements`;
    $("version").textContent = "lit_wsl " + data.version;
    CHIPS.forEach(([key, label]) => $("chips").append(el("button", { type: "button", "data-chip": key, "data-label": label, "aria-pressed": String(key === "all"), text: label, onclick: () => {
      state.chip = key; document.querySelectorAll("#chips button").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.chip === key))); refresh(); } })));
    Object.keys(data.counts.operations).forEach((badge) => $("operation").append(el("option", { value: badge, text: badge })));
  }
  function refresh() { state.entry = -1; state.selected = null; for (const side of [source, target]) side.box.scrollTop = 0; applyFilter(); overview(); }
  function overview() {
    const panel = $("details"), parts = [el("h2", { text: "Look here first" })], families = new Map();
    for (const e of [...entries].sort((a, b) => a.score - b.score || a.margin - b.margin || a.i - b.i)) {
      if (!e.s.length || !source.pass[e.s[0]]) continue;
      const key = (names(source, e.s) + "→" + names(target, e.t)).replace(/\d+/g, "#"), family = families.get(key);
      if (family) family.n++; else families.set(key, { e, n: 1 });
    }
    const worst = [...families.values()].slice(0, 12);
    const list = (side, tensors, cls, more) => {
      // tensors as links, those whose names differ by numbers once
      const alike = new Map(), items = el("ul", { class: "pairlist" });
      for (const t of tensors) { const key = side.names[t].replace(/\d+/g, "#"), found = alike.get(key); if (found) found.n++; else alike.set(key, { t, n: 1 }); }
      for (const { t, n } of [...alike.values()].slice(0, 6)) items.append(el("li", {}, el("button", { type: "button", onclick: () => openTensor(side, t) }, el("span", { class: cls, text: MARKS[cls] + " " }), breakable(side.names[t] + "  " + side.shape[t] + " "), n > 1 ? el("span", { class: "badge", text: "×" + n }) : null, more(side, t))));
      if (alike.size > 6) items.append(el("li", { class: "muted", text: `and ${alike.size - 6} more kinds: press “${cls === "ambiguous" ? "Ambiguous" : "Unmatched"}” above` }));
      return items;
    };
    const withStatus = (side, status) => side.names.map((_, t) => t).filter((t) => side.status[t] === status && side.pass[t]);
    const unsure = withStatus(target, "ambiguous"), counted = (n, one, many) => `${n} ${n === 1 ? one : many}`;
    if (unsure.length) {
      parts.push(el("p", { text: counted(unsure.length, "target tensor is", "target tensors are") + " ambiguous and not loaded:" }));
      parts.push(list(target, unsure, "ambiguous", (side, t) => el("span", { class: "near", text: candidates(t).slice(0, 2).map(([names_, score]) => score.toFixed(2) + " " + names(source, names_)).join("\n") })));
      for (const reason of new Set(unsure.flatMap((t) => (target.cases[t] || []).map((c) => c.reason)))) if (reason) parts.push(el("p", { class: "muted", text: "Why: " + reason }));
      if (data.remedy) parts.push(el("p", { class: "advice", text: data.remedy }));
    }
    for (const [side, title] of [[target, "found no source:"], [source, "found no target:"]]) {
      const left = withStatus(side, "unmatched");
      if (!left.length) continue;
      parts.push(el("p", { text: counted(left.length, side.key + " tensor", side.key + " tensors") + " " + title }), list(side, left, "unmatched", near));
    }
    parts.push(el("p", { class: "muted", text: worst.length ? "The mappings with the lowest scores, alike ones counted. Click one, or a row, for its score breakdown." : "No mapping passes the filter." }));
    const lowest = el("ul", { class: "pairlist" });
    for (const { e, n } of worst) lowest.append(el("li", {}, el("button", { type: "button", onclick: () => openEntry(e) }, el("span", { class: level(e.score), text: e.score.toFixed(2) + " " }), breakable(names(source, e.s) + " → " + names(target, e.t) + " "), n > 1 ? el("span", { class: "badge", text: "×" + n }) : null)));
    panel.replaceChildren(...parts, lowest);
  }
  function near(side, t) {
    // the most alike tensor of the other side, and what to do about it
    const other = side.nearest[t], parts = [];
    if (other !== undefined) {
      const taken = side.other.partners[other].length ? ", matched elsewhere" : "";
      parts.push(el("span", { class: "near", text: `nearest: ${side.other.names[other]}  ${side.other.shape[other]}${taken}` }));
    }
    if (side.advice[t]) parts.push(el("span", { class: "near advice", text: side.advice[t] }));
    return parts.length ? el("span", {}, ...parts) : null;
  }
  function candidates(t) {
    // of all cases of a target, those with its own numbers first: layer 3 of layer 3
    const numbers = (name) => (name.match(/\d+/g) || []).join("."), own = numbers(target.names[t]);
    return (target.cases[t] || []).flatMap((c) => c.c).map(([list, score], i) => [list, score, i, numbers(source.names[list[0]] || "") === own ? 0 : 1])
      .sort((a, b) => a[3] - b[3] || b[1] - a[1] || a[2] - b[2]);
  }
  function showAll() {
    Object.assign(state, { query: "", chip: "all", operation: "", buffers: true });
    $("search").value = ""; $("operation").value = ""; $("buffers").checked = true;
    document.querySelectorAll("#chips button").forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.chip === "all")));
    applyFilter();
  }
  function openTensor(side, tensor) {
    if (!side.pass[tensor]) showAll(); // a link must lead somewhere, whatever the filter hides
    reveal(side, tensor); layout();
    const node = side.rows[side.rowOf[tensor]];
    if (!node) return;
    const top = node.row * ROW - side.box.scrollTop;
    if (top < 0 || top > side.box.clientHeight - ROW) side.box.scrollTop = node.row * ROW - side.box.clientHeight / 2;
    select(node);
  }
  function openEntry(e) {
    e.s.forEach((t) => reveal(source, t)); e.t.forEach((t) => reveal(target, t)); layout();
    const node = source.rows[source.rowOf[e.s[0]]];
    if (!node) return;
    const top = node.row * ROW - source.box.scrollTop;
    if (top < 0 || top > source.box.clientHeight - ROW) source.box.scrollTop = node.row * ROW - source.box.clientHeight / 2;
    select(node, e.i);
  }
  function keys(side, event) {
    const node = side.rows[side.active];
    const move = (r) => { side.active = Math.max(0, Math.min(side.rows.length - 1, r)); const y = side.active * ROW; if (y < side.box.scrollTop) side.box.scrollTop = y; else if (y + ROW > side.box.scrollTop + side.box.clientHeight) side.box.scrollTop = y + ROW - side.box.clientHeight; draw(); };
    if (!node) return;
    if (event.key === "ArrowDown") move(side.active + 1); else if (event.key === "ArrowUp") move(side.active - 1);
    else if (event.key === "Home") move(0); else if (event.key === "End") move(side.rows.length - 1);
    else if (event.key === "ArrowRight") { if (!node.leaf && !node.isOpen) toggle(node); else move(side.active + 1); }
    else if (event.key === "ArrowLeft") { if (!node.leaf && node.isOpen) toggle(node); else if (node.parent) move(node.parent.row); }
    else if (event.key === "Enter" || event.key === " ") select(node); else return;
    event.preventDefault();
  }
  function theme(name) { document.documentElement.dataset.theme = name; }
  for (const side of [source, target]) {
    side.box = $(side.key); side.active = 0;
    side.box.addEventListener("scroll", draw, { passive: true });
    side.box.addEventListener("keydown", (event) => keys(side, event));
  }
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  theme(dark.matches ? "dark" : "light");
  dark.addEventListener("change", () => theme(dark.matches ? "dark" : "light"));
  $("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  let timer = 0;
  $("search").addEventListener("input", (event) => { clearTimeout(timer); timer = setTimeout(() => { state.query = event.target.value.trim(); refresh(); }, 80); });
  $("operation").addEventListener("change", (event) => { state.operation = event.target.value; refresh(); });
  $("buffers").addEventListener("change", (event) => { state.buffers = event.target.checked; refresh(); });
  $("fold").addEventListener("change", (event) => { state.fold = event.target.checked; start(); });
  $("expand").addEventListener("click", () => { const open = (n) => { n.open = !n.leaf; n.children.forEach(open); }; open(source.root); open(target.root); layout(); });
  $("collapse").addEventListener("click", () => { const close = (n) => { n.open = n.depth === 0; n.children.forEach(close); }; for (const s of [source, target]) { s.auto = false; close(s.root); } layout(); });
  document.addEventListener("keydown", (event) => { if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) { event.preventDefault(); $("search").focus(); } });
  window.addEventListener("resize", draw);
  function start() { for (const side of [source, target]) buildTree(side, state.fold); for (const side of [source, target]) measure(side.root); together(); refresh(); }
  function together() {
    // what stands open on one side stands open on the other
    for (const side of [source, target]) {
      const visit = (node) => { const other = node.open && counterpart(node); if (other && visible(other)) other.open = true; node.children.forEach(visit); };
      visit(side.root);
    }
  }
  const visible = (node) => { for (let up = node.parent; up; up = up.parent) if (!up.open) return false; return true; };
  page(); start();
  document.documentElement.dataset.ready = "true";
})();
