// The page's data: facts as plain JSON, latents as deflated bytes in base64 (mechint/report/pack.py writes both).

const FACTS = JSON.parse(document.getElementById("facts").textContent);

const ARRAY_TYPES = { u1: Uint8Array, i2: Int16Array, u2: Uint16Array, u4: Uint32Array, f4: Float32Array };

async function inflate(bytes) {
  if (typeof DecompressionStream === "function") {
    try {
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
      return new Uint8Array(await new Response(stream).arrayBuffer());
    } catch (error) {
      // an old browser with a half-made DecompressionStream: the code below needs nothing of it
    }
  }
  return inflateHere(bytes);
}

// RFC 1950 and 1951, for browsers without DecompressionStream.
function inflateHere(source) {
  let at = 2, bitBuffer = 0, bitCount = 0;
  let out = new Uint8Array(source.length * 4), size = 0;
  const bits = (n) => {
    while (bitCount < n) { bitBuffer |= source[at++] << bitCount; bitCount += 8; }
    const value = bitBuffer & ((1 << n) - 1);
    bitBuffer >>>= n; bitCount -= n;
    return value;
  };
  const room = (n) => {
    if (size + n <= out.length) return;
    const larger = new Uint8Array(Math.max(out.length * 2, size + n));
    larger.set(out); out = larger;
  };
  const table = (lengths) => {
    const count = new Uint16Array(16), offset = new Uint16Array(16), symbol = new Uint16Array(lengths.length);
    for (const length of lengths) count[length]++;
    count[0] = 0;
    for (let i = 1; i < 16; i++) offset[i] = offset[i - 1] + count[i - 1];
    lengths.forEach((length, i) => { if (length) symbol[offset[length]++] = i; });
    return { count, symbol };
  };
  const decode = ({ count, symbol }) => {
    let code = 0, first = 0, index = 0;
    for (let length = 1; length < 16; length++) {
      code |= bits(1);
      if (code - count[length] < first) return symbol[index + (code - first)];
      index += count[length]; first = (first + count[length]) << 1; code <<= 1;
    }
    throw new Error("the data of this page is damaged");
  };
  const range = (n, make) => Array.from({ length: n }, (_, i) => make(i));
  const fixed = [
    table(range(288, (i) => (i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8))), table(range(30, () => 5)),
  ];
  const BASE = [3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195, 227, 258];
  const EXTRA = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
  const DISTANCE = range(30, (i) => (i < 4 ? i + 1 : ((2 + (i & 1)) << ((i >> 1) - 1)) + 1));
  const ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
  for (let last = 0; !last; ) {
    last = bits(1);
    const kind = bits(2);
    if (kind === 0) {
      bitBuffer = 0; bitCount = 0;
      const length = source[at] | (source[at + 1] << 8);
      at += 4; room(length);
      out.set(source.subarray(at, at + length), size);
      size += length; at += length;
      continue;
    }
    let [literals, distances] = fixed;
    if (kind === 2) {
      const nLiterals = bits(5) + 257, nDistances = bits(5) + 1, nLengths = bits(4) + 4;
      const lengths = new Array(19).fill(0);
      for (let i = 0; i < nLengths; i++) lengths[ORDER[i]] = bits(3);
      const codes = table(lengths), all = [];
      while (all.length < nLiterals + nDistances) {
        const symbol = decode(codes);
        if (symbol < 16) { all.push(symbol); continue; }
        const value = symbol === 16 ? all[all.length - 1] : 0;
        let times = symbol === 16 ? 3 + bits(2) : symbol === 17 ? 3 + bits(3) : 11 + bits(7);
        while (times--) all.push(value);
      }
      literals = table(all.slice(0, nLiterals)); distances = table(all.slice(nLiterals));
    }
    for (;;) {
      const symbol = decode(literals);
      if (symbol === 256) break;
      if (symbol < 256) { room(1); out[size++] = symbol; continue; }
      const length = BASE[symbol - 257] + bits(EXTRA[symbol - 257]);
      const code = decode(distances);
      const back = DISTANCE[code] + bits(code < 4 ? 0 : (code >> 1) - 1);
      room(length);
      for (let i = 0; i < length; i++, size++) out[size] = out[size - back];
    }
  }
  return out.subarray(0, size);
}

// -> {header fields..., name: typed array...}, or null for a run whose latents are not in the file
async function readLatents(index) {
  const element = document.getElementById(`latents-${index}`);
  if (!element) return null;
  const text = atob(element.textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  const data = (await inflate(bytes)).slice().buffer;
  const length = new DataView(data).getUint32(0, true);
  const { arrays, ...header } = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  for (const [name, { type, at, n }] of Object.entries(arrays)) header[name] = new ARRAY_TYPES[type](data, 4 + length + at, n);
  return header;
}
