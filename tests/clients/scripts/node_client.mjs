// openai and the AI SDK, which checks every chunk: `node node_client.mjs URL`.

import assert from "node:assert";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const baseURL = `${process.argv[2]}/v1`;
const messages = [{ role: "user", content: "What is the capital of France?" }];
const asked = [{ role: "user", content: "What is the weather in Paris?" }];
const City = z.strictObject({ name: z.enum(["Paris", "Rome"]), is_large: z.boolean() });
const Place = z.strictObject({ city: z.enum(["Paris"]) });

async function useOpenAI() {
  const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
  const body = { model: "default", temperature: 0, max_tokens: 160 };
  const answer = await client.chat.completions.create({ ...body, messages });
  const whole = answer.choices[0].message.content;
  assert(whole.includes("Paris"), whole);
  assert.equal(await client.chat.completions.stream({ ...body, messages }).finalContent(), whole);
  const response = await client.responses.create({
    model: "default",
    input: messages[0].content,
    temperature: 0,
    max_output_tokens: 160,
  });
  assert.equal(response.output_text, whole);

  const parameters = z.toJSONSchema(Place);
  const tools = [{ type: "function", function: { name: "get_weather", strict: true, parameters } }];
  const calling = { ...body, tools, tool_choice: "required", parallel_tool_calls: false };
  const message = await client.chat.completions.stream({ ...calling, messages: asked }).finalMessage();
  const [call] = message.tool_calls;
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Paris" });
  const result = { role: "tool", tool_call_id: call.id, content: "sunny, 21 degrees" };
  const after = await client.chat.completions.create({ ...body, messages: [...asked, message, result] });
  assert(after.choices[0].message.content);

  const parsed = await client.chat.completions.parse({
    ...body,
    messages,
    response_format: zodResponseFormat(City, "city"),
  });
  City.parse(parsed.choices[0].message.parsed);
  return whole;
}

async function useAISDK(whole) {
  const provider = createOpenAICompatible({
    name: "jinn",
    baseURL,
    apiKey: "none",
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
  const options = { model: provider("default"), temperature: 0, maxOutputTokens: 160, maxRetries: 0 };
  const generated = await generateText({ ...options, messages });
  assert.equal(generated.text, whole);
  const streamed = streamText({ ...options, messages });
  let text = "";
  for await (const piece of streamed.textStream) text += piece;
  assert.equal(text, whole);
  assert.equal((await streamed.usage).outputTokens, generated.usage.outputTokens);

  const cities = [];
  const execute = async ({ city }) => {
    cities.push(city);
    return "sunny, 21 degrees";
  };
  const tools = { get_weather: tool({ description: "The weather of a city.", inputSchema: Place, execute }) };
  const prepareStep = ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" });
  const steps = await generateText({ ...options, messages: asked, tools, prepareStep, stopWhen: stepCountIs(2) });
  assert.equal(cities[0], "Paris");
  assert(steps.text);

  const { object } = await generateObject({ ...options, messages, schema: City });
  City.parse(object);
}

await useAISDK(await useOpenAI());
