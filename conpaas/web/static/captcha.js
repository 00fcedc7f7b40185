// The proof-of-work widget, with its workers from our own files.
import "./vendor/altcha/altcha.min.js";

const worker = (name) => () => new Worker(new URL(`./vendor/altcha/${name}.js`, import.meta.url));
for (const bits of [256, 384, 512]) {
  globalThis.$altcha.algorithms.set(`SHA-${bits}`, worker("sha"));
  globalThis.$altcha.algorithms.set(`PBKDF2/SHA-${bits}`, worker("pbkdf2"));
}
