// What the official Node client sees of files and batches, as one JSON object on stdout.
// Usage: node batches.mjs (follow | cancel) BASE_URL API_KEY INPUT.jsonl

import { createReadStream } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI from "openai";

const [course, baseURL, apiKey, path] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const ENDED = ["completed", "failed", "expired", "cancelled"];

const upload = () => client.files.create({ file: createReadStream(path), purpose: "batch" });

const order = (file) =>
  client.batches.create({
    input_file_id: file.id,
    endpoint: "/v1/embeddings",
    completion_window: "24h",
    metadata: { from: "node" },
  });

const lines = async (id) => {
  const answer = await client.files.content(id);
  return (await answer.text()).trimEnd().split("\n").map((line) => JSON.parse(line));
};

const fault = async (call) => {
  try {
    await call;
  } catch (error) {
    const { status, type, param, code } = error;
    return { name: error.constructor.name, status, type, param, code };
  }
  return null;
};

async function follow() {
  const file = await upload();
  const created = await order(file);
  let batch = created;
  while (!ENDED.includes(batch.status)) {
    await sleep(50);
    batch = await client.batches.retrieve(created.id);
  }
  const [output, errors] = [await lines(batch.output_file_id), await lines(batch.error_file_id)];
  const model = await client.models.retrieve(batch.model);
  return { file, created, batch, model, output, errors, deleted: await client.files.delete(file.id) };
}

async function cancel() {
  const file = await upload();
  const ordered = [await order(file), await order(file), await order(file)];
  const listed = [];
  for await (const batch of client.batches.list({ limit: 2 })) listed.push(batch.id);
  const inUse = await fault(client.files.delete(file.id));
  const cancelled = await client.batches.cancel(ordered[0].id);
  return {
    ordered: ordered.map((batch) => batch.id),
    listed,
    cancelled: cancelled.status,
    faults: {
      inUse,
      again: await fault(client.batches.cancel(ordered[0].id)),
      absent: await fault(client.batches.retrieve("batch_0")),
      noFile: await fault(order({ id: "file-none" })),
      endpoint: await fault(
        client.batches.create({ input_file_id: file.id, endpoint: "/v1/responses", completion_window: "24h" }),
      ),
    },
  };
}

console.log(JSON.stringify(await { follow, cancel }[course]()));
