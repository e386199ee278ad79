// When charts are drawn: at most once a frame each. While one is moved under the pointer it comes
// first and at most one other goes with it, none with many lines or after a late frame: what scripts do
// takes little of a frame, what the browser then does to put lines on canvases takes most.

const BUDGET_MS = 8;
const LATE_MS = 22; // a frame at 60 Hz, and a little
const MANY_LINES = 20;
const dirtyCharts = new Set();
let urgentChart = null;
let frameAsked = false;
let lastFrame = 0;

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

function drawFrame(now) {
  frameAsked = false;
  const late = now - lastFrame > LATE_MS;
  lastFrame = now;
  const urgent = dirtyCharts.has(urgentChart);
  const most = urgent ? (late || urgentChart.lines.length > MANY_LINES ? 1 : 2) : dirtyCharts.size;
  const start = performance.now();
  let drawn = 0;
  for (const chart of urgent ? [urgentChart, ...dirtyCharts] : [...dirtyCharts]) {
    if (!dirtyCharts.delete(chart)) continue;
    chart.draw();
    drawn += 1;
    if (drawn >= most || performance.now() - start > BUDGET_MS) break;
  }
  urgentChart = null;
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
