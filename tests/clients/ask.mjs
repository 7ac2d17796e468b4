// One chat request with the official Node client. Reads its parameters from stdin as JSON, and
// BASE_URL and API_KEY from the environment; prints what an `Exchange` of test_clients.py holds,
// bodies in base64.

import { text as read } from "node:stream/consumers";
import OpenAI from "openai";

let asked, heard;

async function recorded(url, init) {
  asked = Buffer.from(init.body);
  const response = await fetch(url, init);
  heard = response.clone().arrayBuffer();
  return response;
}

const { BASE_URL, API_KEY } = process.env;
const client = new OpenAI({ baseURL: BASE_URL, apiKey: API_KEY, maxRetries: 0, fetch: recorded });
const { stream, ...params } = JSON.parse(await read(process.stdin));

let pieces = 0;
let completion;
if (stream) {
  const answer = client.chat.completions.stream(params);
  for await (const chunk of answer) pieces += chunk.choices.some((c) => c.delta.content) ? 1 : 0;
  completion = await answer.finalChatCompletion();
} else {
  completion = await client.chat.completions.create(params);
}

const { content, tool_calls: calls } = completion.choices[0].message;
const base64 = (bytes) => Buffer.from(bytes).toString("base64");
console.log(
  JSON.stringify({
    asked: base64(asked),
    heard: base64(await heard),
    text: content ?? "",
    calls: (calls ?? []).map((c) => [c.function.name, JSON.parse(c.function.arguments)]),
    pieces,
  }),
);
