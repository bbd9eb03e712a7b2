// Data of the page: compressed, read when it is needed.

const bytesOf = (text) => {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const plain = atob(text);
  const bytes = new Uint8Array(plain.length);
  for (let at = 0; at < plain.length; at += 1) bytes[at] = plain.charCodeAt(at);
  return bytes;
};

/** The text of a block. */
const unpack = async (id) => {
  const block = document.getElementById(id);
  if (!block) throw new Error(`the file is cut off: it has no ${id}`);
  const stream = new Blob([bytesOf(block.textContent)]).stream();
  return new Response(stream.pipeThrough(new DecompressionStream('gzip'))).text();
};

const unpackJson = async (id) => JSON.parse(await unpack(id));

const CHUNKS_KEPT = 3;
const chunks = new Map();

/** The lines of a chunk, one a trajectory; the last few chunks are kept. */
const chunkLines = async (chunk) => {
  if (!chunks.has(chunk)) {
    chunks.set(chunk, unpack(`chunk-${chunk}`).then((text) => text.split('\n')));
    if (chunks.size > CHUNKS_KEPT) chunks.delete(chunks.keys().next().value);
  }
  return chunks.get(chunk);
};

/** The body of one trajectory; null where the report has none. */
const bodyOf = async (row) => {
  if (row.chunk < 0) return null;
  const lines = await chunkLines(row.chunk);
  return JSON.parse(lines[row.line]);
};

/** All texts of a body: what was asked, said, sampled, done and called. */
function* textsOf(body) {
  yield body.prompt;
  yield body.error;
  for (const turn of body.turns) {
    yield turn.observation;
    yield turn.text;
    yield turn.action;
    for (const [name, given] of turn.calls) {
      yield name;
      yield given;
    }
  }
}

/** Whether a text of the body holds `lowered`, a text in lower case. */
const holds = (body, lowered) => {
  for (const text of textsOf(body)) {
    if (text.toLowerCase().includes(lowered)) return true;
  }
  return false;
};

/** The set of "chunk:line" whose turns hold the text in any case; reads a chunk at a time. */
const searchBodies = async (text, numChunks, progress, isStopped) => {
  const lowered = text.toLowerCase();
  const found = new Set();
  for (let chunk = 0; chunk < numChunks && !isStopped(); chunk += 1) {
    const lines = (await unpack(`chunk-${chunk}`)).split('\n');
    lines.forEach((line, place) => {
      if (holds(JSON.parse(line), lowered)) found.add(`${chunk}:${place}`);
    });
    progress(chunk + 1);
  }
  return found;
};
