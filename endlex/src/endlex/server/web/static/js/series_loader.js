// Fetches series for charts: what several charts want of one run at once is one request, at most
// four requests run at a time (browsers allow six a server, and the event stream holds one), and a
// request that no chart waits for any more is cancelled.

const METRICS_PER_REQUEST = 6;
const PARALLEL = 4;

export class SeriesLoader {
  constructor(source) {
    this.source = source;
    this.waiting = [];
    this.running = 0;
    this.scheduled = false;
    this.requests = 0;
    this.cancelled = 0;
  }

  // Resolves to the metric's {x, y, count, sampled, nonfinite} with numbers in Float64Arrays.
  load(run, metric, range, signal) {
    return new Promise((resolve, reject) => {
      const key = JSON.stringify([run, range]);
      const job = { run, metric, range, key, signal, resolve, reject };
      signal?.addEventListener("abort", () => this.drop(job), { once: true });
      this.waiting.push(job);
      if (!this.scheduled) {
        this.scheduled = true;
        setTimeout(() => ((this.scheduled = false), this.pump()), 0);
      }
    });
  }

  drop(job) {
    this.waiting = this.waiting.filter((other) => other !== job);
    job.reject(new DOMException("superseded", "AbortError"));
    job.batch?.release(job);
  }

  pump() {
    while (this.running < PARALLEL && this.waiting.length) {
      const first = this.waiting[0];
      const names = new Set();
      const jobs = this.waiting.filter((job) => {
        if (job.key !== first.key) return false;
        if (names.size >= METRICS_PER_REQUEST && !names.has(job.metric)) return false;
        names.add(job.metric);
        return true;
      });
      this.waiting = this.waiting.filter((job) => !jobs.includes(job));
      this.send(jobs, [...names]);
    }
  }

  async send(jobs, names) {
    const abort = new AbortController();
    const left = new Set(jobs);
    const batch = {
      release: (job) => {
        left.delete(job);
        if (left.size === 0 && !abort.signal.aborted) {
          this.cancelled += 1;
          abort.abort();
        }
      },
    };
    for (const job of jobs) job.batch = batch;
    this.running += 1;
    this.requests += 1;
    try {
      const answer = await this.source.series(jobs[0].run, names, jobs[0].range, abort.signal);
      for (const job of left) job.resolve(toArrays(answer.series?.[job.metric]));
    } catch (error) {
      for (const job of left) job.reject(error);
    } finally {
      for (const job of jobs) job.batch = null;
      this.running -= 1;
      this.pump();
    }
  }
}

function toArrays(series) {
  const { x = [], y = [], count = x.length, sampled = false, nonfinite = [] } = series || {};
  return { x: Float64Array.from(x), y: Float64Array.from(y, (value) => value ?? NaN), count, sampled, nonfinite };
}

// A series without points.
export const EMPTY = toArrays();

// `old` up to where `fresh` begins, then `fresh`: how a live chart grows.
export function joinSeries(old, fresh) {
  if (fresh.x.length === 0) return old;
  const start = fresh.x[0];
  let keep = old.x.length;
  while (keep > 0 && old.x[keep - 1] >= start) keep -= 1;
  const x = new Float64Array(keep + fresh.x.length);
  const y = new Float64Array(x.length);
  x.set(old.x.subarray(0, keep));
  x.set(fresh.x, keep);
  y.set(old.y.subarray(0, keep));
  y.set(fresh.y, keep);
  return {
    x,
    y,
    count: old.count + fresh.count - (old.x.length - keep),
    sampled: old.sampled || fresh.sampled,
    nonfinite: [...old.nonfinite.filter(([from]) => from < start), ...fresh.nonfinite],
  };
}
