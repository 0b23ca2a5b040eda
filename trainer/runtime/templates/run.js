"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
for (const chart of data.charts) drawChart(document.getElementById("charts"), chart.title, chart.unit, chart.lines, chart.logarithmic);

const MOST = 120;
const pictureOf = ([row, path, label, predicted, confidence, loss]) => make("figure", {},
  ...(data.images[row] ? [make("img", {src: `data:image/webp;base64,${data.images[row]}`, alt: path || `image ${row}`, loading: "lazy"})] : []),
  make("figcaption", {},
    make("strong", {textContent: data.classes[label]}), ` taken for ${data.classes[predicted]} (${confidence.toFixed(2)}), loss ${loss.toFixed(2)}`,
    ...(path ? [make("br"), path] : [])));

const label = document.getElementById("label"), predicted = document.getElementById("predicted");
const cells = [...document.querySelectorAll("button[data-label]")];
let most = MOST;
function showMistakes() {
  const wanted = data.mistakes.filter(one => (label.value === "" || one[2] === Number(label.value)) && (predicted.value === "" || one[3] === Number(predicted.value)));
  document.querySelector("#mistakes .pictures").replaceChildren(...wanted.slice(0, most).map(pictureOf));
  const notes = [`${wanted.length} of ${data.mistakes.length} mistakes, the highest loss first`];
  if (data.mistakes.length < data.wrong) notes.push(`${data.wrong - data.mistakes.length} more are in predictions.parquet`);
  if (wanted.some(([row]) => data.images[row]) && wanted.some(([row]) => !data.images[row])) notes.push("only those with the highest loss have pictures");
  document.getElementById("shown").textContent = notes.join("; ");
  document.getElementById("more").hidden = wanted.length <= most;
  cells.forEach(cell => cell.setAttribute("aria-pressed", cell.dataset.label === label.value && cell.dataset.predicted === predicted.value));
}
if (label && data.mistakes.length) {
  const choose = () => { most = MOST; showMistakes(); };
  label.addEventListener("change", choose);
  predicted.addEventListener("change", choose);
  document.getElementById("more").addEventListener("click", () => { most += MOST; showMistakes(); });
  cells.forEach(cell => cell.addEventListener("click", () => {
    [label.value, predicted.value] = [cell.dataset.label, cell.dataset.predicted];
    choose();
    document.getElementById("mistakes").scrollIntoView({behavior: "smooth"});
  }));
  document.getElementById("mistakes").hidden = false;
  showMistakes();
}
if (data.suspects?.length) {
  document.querySelector("#suspects .pictures").replaceChildren(...data.suspects.map(pictureOf));
  document.getElementById("suspects").hidden = false;
}
const classes = document.getElementById("classes");
if (classes) makeSortable(classes);
