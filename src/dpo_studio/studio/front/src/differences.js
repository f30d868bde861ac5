// Which words of two answers differ: the longest common subsequence of their words.
const MOST = 1500;

const pieces = (text) => text.match(/\s+|[^\s]+/g) ?? [];

/** Two lists of [text, differs]; texts of more than 1,500 pieces are not compared (a table of them is 2 M cells). */
export function words(left, right) {
  const a = pieces(left);
  const b = pieces(right);
  if (a.length > MOST || b.length > MOST) return [[[left, false]], [[right, false]]];
  const width = b.length + 1;
  const common = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      common[i * width + j] =
        a[i] === b[j]
          ? common[(i + 1) * width + j + 1] + 1
          : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
  const sides = [[], []];
  const add = (side, text, differs) => {
    const last = sides[side].at(-1);
    if (last && last[1] === differs) last[0] += text;
    else sides[side].push([text, differs]);
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) {
      add(0, a[i++], false);
      add(1, b[j++], false);
    } else if (j >= b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1]))
      add(0, a[i], a[i++].trim() !== "");
    else add(1, b[j], b[j++].trim() !== "");
  }
  return sides;
}
