// OpenAI's client for Node.js against a server: `node openai_client.mjs`, with the question on stdin, from test_node.py.
// The question: {url, key, model, prompt, messages, ids, schema, tool, texts}, where `texts` are what `generate` gives.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const { url, key, model, prompt, messages, ids, schema, tool, texts } = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0 });
const complete = (fields) => client.completions.create({ model, prompt, max_tokens: 12, temperature: 0, ...fields });
const chat = (fields) => client.chat.completions.create({ model, messages, max_tokens: 12, temperature: 0, ...fields });

async function all(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

/** How many requests generate now. */
async function running() {
  const metrics = await fetch(url.replace("/v1", "/metrics"), { headers: { authorization: `Bearer ${key}` } });
  return Number(/^fusionroute_requests_running (\S+)$/m.exec(await metrics.text())[1]);
}

const joined = (chunks, index = 0) =>
  chunks.flatMap((chunk) => chunk.choices).filter((choice) => choice.index === index)
    .map((choice) => choice.text ?? choice.delta.content ?? "").join("");

/** As strict as the schema {a: integer}, without another package. */
function checkSchema(text) {
  const content = JSON.parse(text);
  assert.deepEqual(Object.keys(content), schema.required);
  assert.ok(Number.isInteger(content.a), text);
}

const checks = {
  async models() {
    assert.deepEqual((await client.models.list()).data.map((each) => each.id), [model]);
    assert.ok((await client.models.retrieve(model)).fusionroute.experts.length > 1);
  },

  async completions() {
    const answer = await complete();
    assert.equal(answer.choices[0].text, texts.completion);
    assert.equal(answer.usage.prompt_tokens, ids.length);
    assert.equal((await complete({ prompt: ids })).choices[0].text, texts.completion);
    assert.equal(joined(await all(await complete({ stream: true }))), texts.completion);
  },

  async chats() {
    const answer = await chat();
    assert.equal(answer.choices[0].message.content, texts.chat);
    const chunks = await all(await chat({ stream: true, stream_options: { include_usage: true } }));
    assert.equal(joined(chunks), texts.chat);
    assert.equal(chunks[0].choices[0].delta.role, "assistant");
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.deepEqual(chunks.at(-1).usage, answer.usage);
    assert.equal(chunks.at(-2).choices[0].finish_reason, answer.choices[0].finish_reason);
  },

  async "the client's own helper for streams"() {
    const runner = client.chat.completions.stream({ model, messages, max_tokens: 12, temperature: 0 });
    assert.equal(await runner.finalContent(), texts.chat);
  },

  async stop() {
    const answer = await complete({ stop: [texts.stop.at] });
    assert.equal(answer.choices[0].text, texts.stop.text);
    assert.equal(answer.choices[0].finish_reason, "stop");
  },

  async "seed and n"() {
    const answer = await complete({ temperature: 1, seed: 7, n: 2 });
    assert.deepEqual(answer.choices.map((choice) => choice.text), texts.seeds);
    const chunks = await all(await complete({ temperature: 1, seed: 7, n: 2, stream: true }));
    assert.deepEqual([joined(chunks, 0), joined(chunks, 1)], texts.seeds);
  },

  async "sampling of vLLM's"() {
    const fields = { temperature: 0.9, seed: 3, top_k: 8, min_p: 0.02, top_p: 0.95, repetition_penalty: 1.1 };
    assert.equal((await complete(fields)).choices[0].text, texts.sampled);
  },

  async penalties() {
    assert.equal((await complete({ presence_penalty: 0.5, frequency_penalty: 0.25 })).choices[0].text, texts.penalties);
  },

  async logit_bias() {
    assert.equal((await complete({ logit_bias: texts.bias.bias })).choices[0].text, texts.bias.text);
  },

  async logprobs() {
    const content = (await chat({ logprobs: true, top_logprobs: 3 })).choices[0].logprobs.content;
    assert.equal(content.length, texts.logprobs.length);
    content.forEach((token, place) => {
      assert.ok(Math.abs(token.logprob - texts.logprobs[place]) < 1e-3);
      assert.equal(token.top_logprobs.length, 3);
      assert.ok(token.top_logprobs[0].logprob >= token.top_logprobs[2].logprob);
    });
    const { tokens, token_logprobs } = (await complete({ logprobs: 2 })).choices[0].logprobs;
    assert.equal(tokens.length, token_logprobs.length);
  },

  async response_format() {
    const json_schema = { name: "sum", schema, strict: true };
    const options = { response_format: { type: "json_schema", json_schema }, max_tokens: 100 };
    const text = (await chat(options)).choices[0].message.content;
    checkSchema(text);
    assert.equal(text, texts.schema);
    assert.equal(joined(await all(await chat({ ...options, stream: true }))), texts.schema);
    const object = { response_format: { type: "json_object" }, logit_bias: texts.object.bias, max_tokens: 100 };
    assert.equal((await chat(object)).choices[0].message.content, texts.object.text);
    assert.equal((await chat({ structured_outputs: { regex: "[0-9]{4}" } })).choices[0].message.content, texts.regex);
  },

  async tools() {
    const named = { type: "function", function: { name: tool.function.name } };
    for (const tool_choice of ["required", named]) {
      const options = { tools: [tool], tool_choice, max_tokens: 200 };
      const { message, finish_reason } = (await chat(options)).choices[0];
      assert.equal(finish_reason, "tool_calls");
      assert.equal(message.tool_calls[0].function.name, tool.function.name);
      checkSchema(message.tool_calls[0].function.arguments);
      const calls = (await all(await chat({ ...options, stream: true }))).flatMap((chunk) => chunk.choices[0].delta.tool_calls ?? []);
      assert.equal(calls.map((call) => call.function.arguments ?? "").join(""), message.tool_calls[0].function.arguments);
    }
    assert.equal((await chat({ tools: [tool] })).choices[0].message.content, texts.tools);
    assert.equal(joined(await all(await chat({ tools: [tool], stream: true }))), texts.tools);
    assert.equal((await chat({ tools: [tool], tool_choice: "none" })).choices[0].message.content, texts.chat);
  },

  async fusionroute() {
    const options = { fusionroute: { routing: true, candidates: 2, lam: 0.3 } };
    const { tokens } = (await complete(options)).choices[0].fusionroute;
    assert.deepEqual(tokens.map((token) => token.expert), texts.routing.experts);
    assert.equal(tokens.map((token) => token.text).join(""), texts.routing.text);
    assert.deepEqual(Object.keys(tokens[0].candidates), ["router", "expert", "fused"]);
    const chunks = await all(await complete({ ...options, stream: true }));
    assert.deepEqual(chunks.flatMap((chunk) => chunk.choices[0].fusionroute.tokens), tokens);
    const { expert, text } = texts.pinned;
    assert.equal((await complete({ fusionroute: { expert } })).choices[0].text, text);
  },

  async "an abort in the middle of a stream"() {
    const stream = await complete({ max_tokens: 900, stream: true, ignore_eos: true });
    let count = 0;
    for await (const _ of stream) if (++count === 5) stream.controller.abort();
    assert.ok(count < 900);
    for (let tries = 0; (await running()) > 0; tries++) {
      assert.ok(tries < 100, "the session is still busy");
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
    assert.equal((await complete()).choices[0].text, texts.completion);
  },

  async errors() {
    const wrong = new OpenAI({ baseURL: url, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(wrong.models.list(), OpenAI.AuthenticationError);
    await assert.rejects(complete({ model: "gpt" }), (error) => {
      assert.ok(error instanceof OpenAI.NotFoundError);
      assert.equal(error.code, "model_not_found");
      return true;
    });
    await assert.rejects(complete({ max_token: 5 }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.equal(error.error.message, "Unknown argument: max_token.");
      return true;
    });
    await assert.rejects(complete({ prompt: [], stream: true }), OpenAI.BadRequestError);
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
  } catch (error) {
    error.message = `${name}: ${error.message}`;
    throw error;
  }
  console.log(name);
}
