// A chat and a stream with openai and with the AI SDK, which checks every chunk: `node node_client.mjs URL`.

import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, streamText } from "ai";
import OpenAI from "openai";

const baseURL = `${process.argv[2]}/v1`;
const messages = [{ role: "user", content: "What is the capital of France?" }];

const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const body = { model: "default", messages, temperature: 0, max_tokens: 24 };
const answer = await client.chat.completions.create(body);
const whole = answer.choices[0].message.content;
assert(whole.includes("Paris"), whole);
const stream = client.chat.completions.stream(body);
assert.equal(await stream.finalContent(), whole);
const response = await client.responses.create({
  model: "default",
  input: messages[0].content,
  temperature: 0,
  max_output_tokens: 24,
});
assert.equal(response.output_text, whole);

const model = createOpenAICompatible({ name: "jinn", baseURL, apiKey: "none", includeUsage: true })("default");
const options = { model, messages, temperature: 0, maxOutputTokens: 24, maxRetries: 0 };
const generated = await generateText(options);
assert.equal(generated.text, whole);
const streamed = streamText(options);
let text = "";
for await (const piece of streamed.textStream) text += piece;
assert.equal(text, whole);
assert.equal((await streamed.usage).outputTokens, generated.usage.outputTokens);
