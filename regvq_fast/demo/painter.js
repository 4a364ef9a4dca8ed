// Canvas to paint a map of classes on. Properties: value (two hexadecimal digits a cell, row by row), side (cells),
// classes (pairs of name and colour), starts (maps to start from).
const side = props.side, classes = props.classes;
const rgb = classes.map(([, color]) => [1, 3, 5].map((k) => parseInt(color.slice(k, k + 2), 16)));
const root = element.querySelector(".rv-painter");
let cells = read(props.value), chosen = 0, radius = 5, history = [], last = null;

function read(text) {
  return Uint8Array.from({ length: side * side }, (_, k) => parseInt(text.slice(2 * k, 2 * k + 2), 16));
}

function node(tag, properties, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function draw(canvas, ids) {
  const context = canvas.getContext("2d"), pixels = context.createImageData(side, side);
  ids.forEach((id, k) => pixels.data.set([...rgb[id % rgb.length], 255], 4 * k));
  context.putImageData(pixels, 0, 0);
}

const board = node("canvas", { width: side, height: side, className: "rv-board", ariaLabel: "Map to paint on" });
const legend = node("div", { className: "rv-legend" });
const starts = node("div", { className: "rv-starts" });

function choose(id) {
  chosen = id;
  [...legend.children].forEach((button, k) => button.setAttribute("aria-pressed", k === id));
}

function show() {
  draw(board, cells);
}

function commit() {
  show();
  props.value = [...cells].map((id) => id.toString(16).padStart(2, "0")).join("");
}

function remember() {
  history.push(cells.slice());
  if (history.length > 50) history.shift();
}

function replace(ids) {
  remember();
  cells = ids.slice();
  commit();
}

function dab(x, y) {
  const low = (v) => Math.max(0, Math.floor(v - radius)), high = (v) => Math.min(side - 1, Math.ceil(v + radius));
  for (let row = low(y); row <= high(y); row++)
    for (let column = low(x); column <= high(x); column++)
      if ((row + 0.5 - y) ** 2 + (column + 0.5 - x) ** 2 <= radius ** 2) cells[row * side + column] = chosen;
}

function stroke(event) {
  const box = board.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width) * side, y = ((event.clientY - box.top) / box.height) * side;
  const from = last ?? [x, y], steps = Math.ceil(Math.hypot(x - from[0], y - from[1])) || 1;
  for (let k = 1; k <= steps; k++) dab(from[0] + ((x - from[0]) * k) / steps, from[1] + ((y - from[1]) * k) / steps);
  last = [x, y];
  show();
}

board.addEventListener("pointerdown", (event) => {
  board.setPointerCapture(event.pointerId);
  remember();
  stroke(event);
});
board.addEventListener("pointermove", (event) => last && stroke(event));
for (const end of ["pointerup", "pointercancel"])
  board.addEventListener(end, () => {
    if (last) commit();
    last = null;
  });

classes.forEach(([name, color], id) => {
  const swatch = node("span", { className: "rv-swatch" });
  swatch.style.background = color;
  legend.append(node("button", { type: "button", onclick: () => choose(id) }, swatch, name));
});
for (const text of props.starts) {
  const ids = read(text), small = node("canvas", { width: side, height: side });
  draw(small, ids);
  starts.append(node("button", { type: "button", ariaLabel: "Start from this map", onclick: () => replace(ids) }, small));
}
const size = node("input", { type: "range", min: 1, max: Math.round(side / 4), value: radius, ariaLabel: "Brush size" });
size.addEventListener("input", () => (radius = Number(size.value)));
const undo = () => {
  if (history.length) {
    cells = history.pop();
    commit();
  }
};
root.append(
  board,
  node(
    "div",
    { className: "rv-tools" },
    node("label", {}, "Brush", size),
    node("button", { type: "button", className: "rv-undo", onclick: undo }, "Undo"),
    node("button", { type: "button", className: "rv-fill", onclick: () => replace(cells.slice().fill(chosen)) }, "Fill"),
  ),
  legend,
);
if (props.starts.length) root.append(node("div", { className: "rv-note" }, "Start from:"), starts);
choose(0);
show();
