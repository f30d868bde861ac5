// Builds the pages: `make front`. The result is committed, so that users need no node.
import { build } from "esbuild";
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readFileSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const here = fileURLToPath(new URL(".", import.meta.url));
const out = process.argv[2] ?? `${here}dist`;
rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
await build({
  entryPoints: { app: `${here}src/app.jsx` },
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  jsx: "automatic",
  jsxImportSource: "preact",
  legalComments: "eof",
  outdir: out,
});
copyFileSync(`${here}src/index.html`, `${out}/index.html`);

// What it was built from, and what was built: a test compares both, also where there is no node.
const sources = [...readdirSync(`${here}src`).map((name) => `${here}src/${name}`), `${here}build.mjs`, `${here}../../../../package-lock.json`];
const built = ["app.css", "app.js", "index.html"].map((name) => `${out}/${name}`);
const line = (file) => `${createHash("sha256").update(readFileSync(file)).digest("hex")}  ${file.split("/").pop()}\n`;
writeFileSync(`${out}/SHA256SUMS`, [...sources, ...built].sort().map(line).join(""));
