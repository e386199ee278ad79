// When charts are drawn: at most once a frame each, the one under the pointer first, the others as
// far as the frame's time goes and in the next frames.

const BUDGET_MS = 10;
const dirtyCharts = new Set();
let urgentChart = null;
let frameAsked = false;

export function requestDraw(chart, urgent = false) {
  dirtyCharts.add(chart);
  if (urgent) urgentChart = chart;
  askFrame();
}

export function cancelDraw(chart) {
  dirtyCharts.delete(chart);
}

function askFrame() {
  if (frameAsked) return;
  frameAsked = true;
  requestAnimationFrame(drawFrame);
}

function drawFrame() {
  frameAsked = false;
  const start = performance.now();
  const first = dirtyCharts.has(urgentChart) ? [urgentChart] : [];
  for (const chart of [...first, ...dirtyCharts]) {
    if (!dirtyCharts.delete(chart)) continue;
    chart.draw();
    if (performance.now() - start > BUDGET_MS) break;
  }
  if (dirtyCharts.size) askFrame();
}

// Passes on the latest of many calls, once a frame: a mouse reports more often than that.
export function throttleFrames(call) {
  let latest = null;
  return (...given) => {
    if (latest === null) {
      requestAnimationFrame(() => {
        const values = latest;
        latest = null;
        call(...values);
      });
    }
    latest = given;
  };
}
