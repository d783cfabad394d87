const dark = window.matchMedia('(prefers-color-scheme: dark)');
const narrow = window.matchMedia('(max-width: 640px)');
function themed(figure) {
  const text = JSON.stringify(figure);
  const light = text.replaceAll('#1a1a1a', '#e6e6e6').replaceAll('rgba(26,26,26', 'rgba(230,230,230');
  return JSON.parse(dark.matches ? light : text);
}
function oneColumn(layout) {  // panels below each other on a phone
  const axes = Object.keys(layout).filter(key => /^xaxis/.test(key) && layout[key].domain);
  if (!narrow.matches || axes.length < 2) return;
  const titles = (layout.annotations || []).filter(note => note.yref === 'paper' && note.showarrow === false);
  const perPanel = layout.height / Math.ceil(axes.length / 2);
  const gap = 90 / (perPanel * axes.length - 94), height = (1 - gap * (axes.length - 1)) / axes.length;
  axes.forEach((key, i) => {
    const top = 1 - i * (height + gap);
    layout[key].domain = [0, 1];
    layout['y' + key.slice(1)].domain = [Math.max(0, top - height), top];
    if (titles.length === axes.length) { titles[i].x = 0.5; titles[i].y = top; titles[i].font = {size: 11}; }
  });
  layout.height = perPanel * axes.length;
}
function labelsAbove(layout) {  // a row's label above it on a phone, where there is no room beside it
  if (!narrow.matches || layout.meta !== 'rows') return;
  const axis = layout.yaxis, texts = axis.ticktext, lines = Math.max(...texts.map(t => t.split('<br>').length));
  axis.showticklabels = false;
  axis.range = [axis.range[0], axis.range[1] - 0.4];
  layout.height += (10 + 6 * lines) * texts.length;
  layout.annotations = (layout.annotations || []).concat(texts.map((text, i) => ({text: text, showarrow: false,
    xref: 'paper', x: 0, xanchor: 'left', yref: 'y', y: axis.tickvals[i] - 0.12, yanchor: 'bottom', font: {size: 11},
    align: 'left'})));
  layout.margin = {...layout.margin, l: 16};
}
function draw() {
  const hidden = new Set([...document.querySelectorAll('#norms input:not(:checked)')].map(box => box.value));
  FIGURES.forEach((figure, i) => {
    const copy = themed(figure);
    copy.data.forEach(trace => { trace.visible = !hidden.has(trace.meta); });
    oneColumn(copy.layout);
    labelsAbove(copy.layout);
    const options = {responsive: true, displaylogo: false, displayModeBar: narrow.matches ? false : 'hover'};
    Plotly.react('figure-' + i, copy.data, copy.layout, options);
  });
}
draw();
dark.addEventListener('change', draw);
narrow.addEventListener('change', draw);
document.querySelectorAll('#norms input').forEach(box => box.addEventListener('change', draw));
function value(cell) {
  const number = parseFloat(cell.textContent.replace(/^[<>]\s*/, '').replace(/,/g, ''));
  return Number.isNaN(number) ? null : number;
}
function sort(heading) {
  const column = heading.cellIndex, body = heading.closest('table').tBodies[0];
  const down = heading.getAttribute('aria-sort') === 'ascending';
  heading.parentNode.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
  heading.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  const rows = [...body.rows];
  rows.sort((a, b) => {
    const [x, y] = [a.cells[column], b.cells[column]], [p, q] = [value(x), value(y)];
    const order = p !== null && q !== null ? p - q : x.textContent.localeCompare(y.textContent);
    return down ? -order : order;
  });
  rows.forEach(row => body.appendChild(row));
}
document.querySelectorAll('th').forEach(heading => {
  heading.addEventListener('click', () => sort(heading));
  heading.addEventListener('keydown', event => { if (event.key === 'Enter') sort(heading); });
});
