// The studio: the pages, the way between them, and the log-in.
import { render } from "preact";
import { useEffect, useState } from "preact/hooks";
import { post } from "./api.js";
import { Chat } from "./chat.jsx";
import { Compare } from "./compare.jsx";
import { Data } from "./data.jsx";
import { Export } from "./export.jsx";
import { NewRun } from "./new.jsx";
import { Field, Trouble, Waiting, link, useAction, useGet } from "./parts.jsx";
import { Machine } from "./settings.jsx";
import { Run } from "./run.jsx";
import { Runs } from "./runs.jsx";
import "./style.css";
import { Votes } from "./votes.jsx";

const PAGES = {
  runs: ["Runs", Runs],
  data: ["Data", Data],
  new: ["New run", NewRun],
  compare: ["Compare", Compare],
  votes: ["Votes", Votes],
  chat: ["Chat", Chat],
  export: ["Export", Export],
  machine: ["Settings", Machine],
};

function address() {
  const [path, given = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [page = "", ...rest] = path.split("/").map(decodeURIComponent);
  return { page: page || "runs", rest, given: Object.fromEntries(new URLSearchParams(given)) };
}

function useAddress() {
  const [now, setNow] = useState(address);
  useEffect(() => {
    const on = () => {
      setNow(address());
      scrollTo(0, 0);
      document.querySelector("h1")?.focus();
    };
    addEventListener("hashchange", on);
    setNow(address()); // it may have changed since the first rendering
    return () => removeEventListener("hashchange", on);
  }, []);
  return now;
}

const THEMES = ["system", "light", "dark"];

function theme(chosen) {
  if (chosen === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = chosen;
  localStorage.setItem("theme", chosen);
  dispatchEvent(new Event("theme"));
}

function Theme() {
  const [chosen, setChosen] = useState(localStorage.getItem("theme") ?? "system");
  return (
    <label class="inline theme">
      <span class="hidden">Colours</span>
      <select
        value={chosen}
        onChange={(event) => {
          setChosen(event.target.value);
          theme(event.target.value);
        }}
      >
        {THEMES.map((name) => (
          <option key={name}>{name}</option>
        ))}
      </select>
    </label>
  );
}

function LogIn({ hint, onDone }) {
  const [password, setPassword] = useState("");
  const [send, busy, refused] = useAction(async () => {
    await post("/api/login", { password });
    onDone();
  });
  return (
    <main>
      <h1>Log in</h1>
      <p>{hint}</p>
      <form
        class="panel"
        onSubmit={(event) => {
          event.preventDefault();
          send();
        }}
      >
        <Field label="Password" help="of a studio that was started with one">
          <input type="password" autocomplete="current-password" value={password} onInput={(event) => setPassword(event.target.value)} />
        </Field>
        <p class="actions">
          <button class="first" disabled={busy || !password}>
            Log in
          </button>
        </p>
        <Trouble error={refused} />
      </form>
    </main>
  );
}

function App() {
  const { page, rest, given } = useAddress();
  const { value: session, error, again } = useGet("/api/session", 15000);
  const [title, Page] = page === "run" ? [rest.join("/"), Run] : (PAGES[page] ?? PAGES.runs);
  useEffect(() => {
    document.title = `${title} · DPO Studio`;
  }, [title]);
  if (error?.status === 401) return <LogIn hint={error.hint} onDone={again} />;
  if (!session) return <main>{error ? <Trouble error={error} /> : <Waiting />}</main>;
  const props = page === "run" ? { name: rest.join("/") } : given;
  return (
    <>
      <header class="top">
        <a class="brand" href={link("runs")}>
          DPO Studio
        </a>
        <nav aria-label="pages">
          {Object.entries(PAGES).map(([key, [name]]) => (
            <a key={key} href={link(key)} aria-current={key === page ? "page" : undefined}>
              {name}
            </a>
          ))}
        </nav>
        <Theme />
      </header>
      <main>
        <h1 tabindex="-1">{title}</h1>
        {error && <Trouble error={error} />}
        <Page key={`${page} ${JSON.stringify(props)}`} {...props} />
      </main>
      <footer>
        <p>
          {session.folder} · DPO Studio {session.version}
        </p>
      </footer>
    </>
  );
}

theme(localStorage.getItem("theme") ?? "system");
render(<App />, document.getElementById("app"));
