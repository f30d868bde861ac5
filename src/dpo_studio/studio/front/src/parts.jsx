// Parts that several pages share.
import { cloneElement } from "preact";
import { useCallback, useEffect, useId, useRef, useState } from "preact/hooks";
import { get, post } from "./api.js";

export const percent = (value) => (value == null ? "–" : `${(100 * value).toFixed(1)} %`);
export const number = (value, digits = 3) => (value == null ? "–" : Number(value).toPrecision(digits));
export const bytes = (value) => (value == null ? "–" : `${(value / 2 ** 30).toFixed(1)} GiB`);
export const link = (...parts) => `#/${parts.map(encodeURIComponent).join("/")}`;
export const when = (time) => new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });

/** Ctrl and Enter in a field of several lines, where Enter alone begins a line. */
export const sends = (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.value.trim()) event.target.form.requestSubmit();
};

/** {value, error, again} of a GET, asked again every `every` milliseconds while the page is visible. */
export function useGet(path, every = 0) {
  const [state, setState] = useState({ value: null, error: null });
  const asked = useRef(path);
  asked.current = path;
  const again = useCallback(async () => {
    if (!path) return;
    try {
      const value = await get(path);
      if (asked.current === path) setState({ value, error: null });
    } catch (error) {
      if (asked.current === path) setState((old) => ({ value: old.value, error }));
    }
  }, [path]);
  useEffect(() => {
    setState({ value: null, error: null });
    again();
    if (!every) return undefined;
    const timer = setInterval(() => document.hidden || again(), every);
    return () => clearInterval(timer);
  }, [again, every]);
  return { ...state, again };
}

/** Run something that may be refused: [run, busy, error]. */
export function useAction(action) {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const run = async (...args) => {
    setBusy(true);
    setError(null);
    try {
      return await action(...args);
    } catch (failed) {
      setError(failed);
      return undefined;
    } finally {
      setBusy(false);
    }
  };
  return [run, busy, error, setError];
}

export function Trouble({ error }) {
  if (!error) return null;
  return (
    <div class="trouble" role="alert">
      <strong>{error.message ?? error.error}</strong>
      {error.hint && <span> {error.hint}</span>}
    </div>
  );
}

/** What is on the Hub is downloaded when somebody says so. Everything else that is refused is said. */
export function Asking({ error, onYes }) {
  const [yes, busy, refused] = useAction(async () => {
    await post("/api/downloads", { name: error.message.split(" ")[0] });
    onYes();
  });
  if (error?.field !== "download") return <Trouble error={error} />;
  return (
    <div class="panel finding unclear" role="alert">
      <p>
        {error.message}. {error.hint}.
      </p>
      <p class="actions">
        <button type="button" class="first" disabled={busy} onClick={yes}>
          Download it
        </button>
      </p>
      <Trouble error={refused} />
    </div>
  );
}

export const Waiting = ({ children = "Loading" }) => (
  <p class="waiting" role="status">
    <span class="spinner" aria-hidden="true" /> {children} …
  </p>
);

export const Empty = ({ title, children }) => (
  <div class="panel empty">
    <h2>{title}</h2>
    <div>{children}</div>
  </div>
);

export function Field({ label, help, error, children }) {
  const id = useId();
  return (
    <div class="field">
      <label>
        <span>{label}</span>
        {cloneElement(children, { "aria-describedby": id, "aria-invalid": Boolean(error) })}
      </label>
      <div id={id}>
        {help && <small>{help}</small>}
        {error && (
          <small class="wrong" role="alert">
            {error.message} {error.hint}
          </small>
        )}
      </div>
    </div>
  );
}

/** A table that may be wider than the page: it is scrolled by keyboard, too. */
export const Table = ({ name, children, ...more }) => (
  <div class="table" role="region" aria-label={name} tabindex="0">
    <table {...more}>{children}</table>
  </div>
);

/** An input whose text is its own while somebody types: `0.` is no number yet, and a page that is drawn again keeps it. */
export function Typed({ value, onText, ...more }) {
  const [text, setText] = useState(null);
  const on = (event) => {
    setText(event.target.value);
    onText(event.target.value);
  };
  return <input {...more} value={text ?? value} onInput={on} onBlur={() => setText(null)} />;
}

const CHIPS = { running: "tuned", finished: "better", failed: "worse", stopped: "unclear", interrupted: "unclear" };
export const State = ({ of }) => <span class={`chip ${CHIPS[of] ?? "none"}`}>{of}</span>;

export const Command = ({ children }) => (
  <pre class="command" tabindex="0" aria-label="command">
    $ {children}
  </pre>
);

/** A job until it ends: its state, its command, its log, the command's own error and hint. */
export function Job({ id, onEnd }) {
  const { value: job, error, again } = useGet(`/api/jobs/${encodeURIComponent(id)}`);
  const running = !job || job.state === "running";
  useEffect(() => {
    if (!running) {
      onEnd?.(job);
      return undefined;
    }
    const timer = setInterval(again, 1000);
    return () => clearInterval(timer);
  }, [running, again]);
  if (!job) return error ? <Trouble error={error} /> : <Waiting />;
  return (
    <div class="panel" aria-live="polite">
      <p>
        <State of={job.state} /> <b>{job.verb}</b>
      </p>
      <Command>{job.command}</Command>
      <Trouble error={job.error ? { message: job.error, hint: job.hint } : error} />
      <details open={!running}>
        <summary>Output</summary>
        <pre tabindex="0">{[job.out, job.log].filter(Boolean).join("\n") || "nothing yet"}</pre>
      </details>
    </div>
  );
}

export const Turns = ({ of }) =>
  (typeof of === "string" ? [{ role: "user", content: of }] : (of ?? [])).map((turn, at) => (
    <p key={at} class="text" dir="auto">
      {of.length > 1 && <b class="role">{turn.role}: </b>}
      {turn.content}
    </p>
  ));
