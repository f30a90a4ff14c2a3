// A picture on which people point, draw a rectangle, or paint: with mouse, finger or pen; with arrow keys, of which
// Shift draws the rectangle. Events: 'place' {x, y}, 'region' {x0, y0, x1, y1}, 'stroke' {points}; all in shares of
// the picture. 'pick' {index} is a click on a button below it.
const view = () => element.querySelector('.calm-view');
const clamp = v => Math.min(1, Math.max(0, v));
const corners = (a, b) => ({
  x0: Math.min(a[0], b[0]), y0: Math.min(a[1], b[1]), x1: Math.max(a[0], b[0]), y1: Math.max(a[1], b[1])
});
let path = null;      // of the pointer that is down
let focused = false;  // to keep the focus when the server redraws the picture
let anchor = null;    // the fixed corner of a rectangle drawn by keys

function at(event) {
  const box = view().getBoundingClientRect();
  return [clamp((event.clientX - box.left) / box.width), clamp((event.clientY - box.top) / box.height)];
}

function show(region) {
  const style = view().querySelector('.calm-rect').style;
  const percent = v => `${100 * v}%`;
  style.display = 'block';
  style.left = percent(region.x0);
  style.top = percent(region.y0);
  style.width = percent(region.x1 - region.x0);
  style.height = percent(region.y1 - region.y0);
}

element.addEventListener('click', event => {
  const button = event.target.closest('button[data-index]');
  if (button) trigger('pick', { index: Number(button.dataset.index) });
});

element.addEventListener('pointerdown', event => {
  if (!event.target.closest('.calm-view') || event.button) return;
  event.preventDefault();
  path = [at(event)];
  focused = true;
  view().focus({ preventScroll: true });
  view().setPointerCapture(event.pointerId);
});

element.addEventListener('pointermove', event => {
  if (!path) return;
  path.push(at(event));
  if (view().dataset.brush) {
    const line = view().querySelector('polyline');
    line.setAttribute('points', path.map(p => `${100 * p[0]},${100 * p[1]}`).join(' '));
  } else {
    show(corners(path[0], path.at(-1)));
  }
});

element.addEventListener('pointercancel', () => { path = null; });

element.addEventListener('pointerup', event => {
  if (!path) return;
  const [first, last] = [path[0], at(event)];
  if (view().dataset.brush) {
    trigger('stroke', { points: path });
  } else if (Math.max(Math.abs(first[0] - last[0]), Math.abs(first[1] - last[1])) < 0.01) {
    anchor = null;
    trigger('place', { x: last[0], y: last[1] });
  } else {
    trigger('region', corners(first, last));
  }
  path = null;
});

element.addEventListener('keydown', event => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!step || !event.target.closest('.calm-view') || view().dataset.brush) return;
  event.preventDefault();
  focused = true;
  const data = view().dataset;
  const from = [Number(data.x), Number(data.y)];
  const to = [clamp(from[0] + step[0] / data.columns), clamp(from[1] + step[1] / data.rows)];
  [data.x, data.y] = to;
  if (event.shiftKey) {
    anchor = anchor || from;
    if (anchor[0] !== to[0] && anchor[1] !== to[1]) trigger('region', corners(anchor, to));
  } else {
    anchor = null;
    trigger('place', { x: to[0], y: to[1] });
  }
});

element.addEventListener('focusout', () => { focused = false; });
watch('value', () => { if (focused && view()) view().focus({ preventScroll: true }); });
