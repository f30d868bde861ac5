// A figure of lines over steps, by uPlot. It is drawn again when the theme or the width changes.
import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

const COLOURS = ["--tuned", "--base", "--better", "--worse", "--unclear", "--muted"];
const HEIGHT = 230;
const STEPS = [1, 2, 5].flatMap((each) => [1, 10, 100, 1e3, 1e4, 1e5].map((size) => each * size)).sort((a, b) => a - b);

/** `lines`: [{label, values}]; `x`: steps. What it shows is said in words for those who cannot see it. */
export function Curve({ title, note, x, lines }) {
  const place = useRef(null);
  const plot = useRef(null);
  const labels = lines.map((line) => line.label).join("\n");
  useEffect(() => {
    const draw = () => {
      plot.current?.destroy();
      const style = getComputedStyle(document.documentElement);
      const of = (name) => style.getPropertyValue(name).trim();
      const axis = { stroke: of("--muted"), grid: { stroke: of("--line"), width: 1 }, ticks: { show: false } };
      plot.current = new uPlot(
        {
          width: place.current.clientWidth,
          height: HEIGHT,
          scales: { x: { time: false } },
          axes: [{ ...axis, incrs: STEPS }, { ...axis, size: 56 }],
          legend: { live: true },
          series: [
            { label: "step" },
            ...labels.split("\n").map((label, at) => ({
              label,
              stroke: of(COLOURS[at % COLOURS.length]),
              width: 1.6,
              spanGaps: true,
              points: { show: false },
              value: (_, value) => (value == null ? "–" : value.toPrecision(4)),
            })),
          ],
        },
        [x, ...lines.map((line) => line.values)],
        place.current,
      );
    };
    draw();
    const wide = new ResizeObserver(() =>
      plot.current.setSize({ width: place.current.clientWidth, height: HEIGHT }),
    );
    wide.observe(place.current);
    addEventListener("theme", draw);
    return () => {
      wide.disconnect();
      removeEventListener("theme", draw);
      plot.current.destroy();
    };
  }, [labels]);
  useEffect(() => plot.current?.setData([x, ...lines.map((line) => line.values)]), [x, lines]);
  const said = lines.map((line) => `${line.label}: ${line.values.findLast((value) => value != null) ?? "nothing yet"}`);
  return (
    <figure class="curve">
      <figcaption>
        <h3>{title}</h3>
        {note && <p>{note}</p>}
      </figcaption>
      <div ref={place} role="img" aria-label={`${title} over steps. Last values: ${said.join(", ")}`} />
    </figure>
  );
}
