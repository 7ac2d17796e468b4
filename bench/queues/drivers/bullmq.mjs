// BullMQ, by its worker. The protocol is that of bench/queues/driver.py.

import { createRequire } from "node:module";

// Modules beside the place where the peer is installed, not beside this file.
const { Queue, Worker } = createRequire(process.env.BENCH_HOME + "/")("bullmq");

const TOGETHER = 100; // tasks of a fill in one call
const BURN_IN = 0.1; // share of the first runs that do not count

const [verb, json] = process.argv.slice(2);
const said = JSON.parse(json);
const { hostname: host, port } = new URL(said.url);
const connection = { host, port: Number(port), maxRetriesPerRequest: null };

const now = () => Number(process.hrtime.bigint());
const say = (line) => process.stdout.write(JSON.stringify(line) + "\n");
const end = (line) => process.stdout.write(JSON.stringify(line) + "\n", () => process.exit(0));

const queue = verb === "work" ? null : new Queue(said.queue, { connection });
const put = (sent) => queue.add("ran", { sent });
const putAll = (sent) => queue.addBulk(sent.map((one) => ({ name: "ran", data: { sent: one } })));
const send = (each) => (each === 1 ? put(0) : putAll(Array(each).fill(0)));

async function enqueue({ callers, each, seconds }) {
  await Promise.all(Array.from({ length: callers }, () => send(each)));
  const began = now();
  const until = began + seconds * 1e9;
  const call = async () => {
    let count = 0;
    while (now() < until) {
      await send(each);
      count += each;
    }
    return count;
  };
  const counts = await Promise.all(Array.from({ length: callers }, call));
  return { per_s: (counts.reduce((a, b) => a + b) * 1e9) / (now() - began) };
}

async function fill({ tasks }) {
  for (let left = tasks; left > 0; left -= TOGETHER)
    await putAll(Array(Math.min(TOGETHER, left)).fill(0));
  return {};
}

async function pace({ rate, seconds }) {
  const began = now();
  const sent = [];
  for (let number = 0; number < rate * seconds; number++) {
    const due = began + (number * 1e9) / rate;
    const wait = (due - now()) / 1e6;
    if (wait > 0) await new Promise((done) => setTimeout(done, wait));
    sent.push(put(Math.round(due)));
  }
  await Promise.all(sent);
  return {};
}

function work({ workers, tasks, within_s }) {
  const runs = [];
  const done = () => {
    const times = runs.map(([, at]) => at).sort((a, b) => a - b);
    const first = Math.floor(times.length * BURN_IN);
    const spent = times[times.length - 1] - times[first];
    end({ per_s: spent > 0 ? ((times.length - 1 - first) * 1e9) / spent : 0, runs });
  };
  let timer = setTimeout(done, within_s * 1e3);
  const ran = async (job) => {
    if (runs.length === 0) {
      say({ ready: true });
      clearTimeout(timer);
      timer = setTimeout(done, within_s * 1e3);
    }
    runs.push([job.data.sent, now()]);
    if (runs.length === tasks) done();
  };
  new Worker(said.queue, ran, { connection, concurrency: workers });
}

const verbs = { enqueue, fill, pace, prepare: async () => ({}) };
if (verb === "work") work(said);
else end(await verbs[verb](said));
