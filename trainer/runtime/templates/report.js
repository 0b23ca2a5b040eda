"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const table = document.getElementById("runs"), filter = document.getElementById("filter");
makeSortable(table);

const rows = [...table.tBodies[0].rows].map(row => [row, row.textContent.toLowerCase()]);
function filterRows() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const [row, text] of rows) {
    row.hidden = !words.every(word => text.includes(word));
    shown += !row.hidden;
  }
  document.getElementById("count").textContent = words.length ? `${shown} of ${rows.length} runs` : "";
}
filter.addEventListener("input", filterRows);

/* The exact test of McNemar (1947): of the images that only one of two runs gets right, how many each does. */
function bitsOf(run) {
  return run.correct == null ? null : Uint8Array.from(atob(run.correct), character => character.charCodeAt(0));
}
const countBits = byte => { let count = 0; for (; byte; byte &= byte - 1) count++; return count; };
function findPValue(fewer, total) {
  let logarithm = -total * Math.LN2, sum = 0;
  for (let k = 0; k <= fewer; k++) {
    sum += Math.exp(logarithm);
    logarithm += Math.log((total - k) / (k + 1));
  }
  return Math.min(1, 2 * sum);
}
function compare(one, other) {
  if (one.images_of !== other.images_of) return "different datasets: only the intervals can be compared";
  const [first, second] = [bitsOf(one), bitsOf(other)];
  if (!first || !second || one.images !== other.images) return "the predictions of one of them are not on this page";
  let firstOnly = 0, secondOnly = 0;
  first.forEach((byte, i) => { firstOnly += countBits(byte & ~second[i]); secondOnly += countBits(second[i] & ~byte); });
  const p = findPValue(Math.min(firstOnly, secondOnly), firstOnly + secondOnly);
  const counts = `correct only in ${one.name}: ${firstOnly}, only in ${other.name}: ${secondOnly}; p = ${Number(p.toPrecision(2))}`;
  if (p >= 0.05) return `not distinguishable on ${one.images} images (${counts})`;
  const [better, worse] = firstOnly > secondOnly ? [one, other] : [other, one];
  return `${better.name} is better than ${worse.name} on ${one.images} images (${counts})`;
}

const section = document.getElementById("chosen"), boxes = [...table.querySelectorAll("input[type=checkbox]")];
function showChosen() {
  const chosen = boxes.filter(box => box.checked).map(box => data.runs[Number(box.value)]).sort((a, b) => a.number - b.number);
  const place = section.querySelector(".charts");
  charts.splice(0).forEach(chart => chart.destroy());
  place.replaceChildren();
  section.hidden = !chosen.length;
  if (!chosen.length) return;
  for (const [title, name] of [["validation loss", "val_loss"], ["validation accuracy", "val_accuracy"]]) {
    const lines = chosen.filter(run => run.epochs.length).map((run, i) => (
      {name: run.name, x: run.epochs, y: run[name], color: `--c${i % 7}`, dashed: i >= 7, best: run.best}));
    if (lines.length) drawChart(place, title, "epoch", lines, name === "val_loss" && chosen.some(run => run.spike));
  }
  document.getElementById("verdicts").replaceChildren(
    ...chosen.slice(1).map(run => make("p", {textContent: `${chosen[0].name} and ${run.name}: ${compare(chosen[0], run)}`})));
  const optionsOf = run => ({...data.config, ...run.config});
  const names = Object.keys(optionsOf(chosen[0])).filter(name => new Set(chosen.map(run => optionsOf(run)[name])).size > 1);
  const cells = (tag, texts) => make("tr", {}, ...texts.map(textContent => make(tag, {textContent})));
  const compared = section.querySelector(".compared");
  compared.hidden = !names.length;
  compared.tHead.replaceChildren(cells("th", ["option", ...chosen.map(run => run.name)]));
  compared.tBodies[0].replaceChildren(...names.map(name => cells("td", [name, ...chosen.map(run => optionsOf(run)[name] ?? "")])));
}
boxes.forEach(box => box.addEventListener("change", showChosen));
boxes.filter(box => data.runs[Number(box.value)].images_of === data.runs[0].images_of).slice(0, 3).forEach(box => { box.checked = true; });
showChosen();
