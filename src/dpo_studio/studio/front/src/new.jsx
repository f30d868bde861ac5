// A new run: a form made of the recipe's JSON Schema beside the YAML that it writes, the command, and its start.
import { useEffect, useState } from "preact/hooks";
import { newId, post } from "./api.js";
import { Command, Field, Job, Trouble, Typed, Waiting, link, useAction, useGet } from "./parts.jsx";

const FIRST = ["model.path", "data.train.source", "data.held_out.fraction", "data.max_length", "objective.kind", "objective.beta"];

/** Objectives have fields of their own: those of the kind that is chosen. */
function objective(schema, kind = "dpo") {
  const kinds = schema.properties.objective.oneOf.map((each) => resolved(each, schema));
  const own = kinds.find((each) => each.properties.kind.const === kind) ?? kinds[0];
  const choice = { enum: kinds.map((each) => each.properties.kind.const), default: "dpo", description: "the loss", kind: true };
  const { kind: _, ...others } = own.properties;
  return [[["objective", "kind"], choice], ...Object.entries(others).map(([key, each]) => [["objective", key], resolved(each, schema)])];
}

const set = (values, path, value) => {
  const [key, ...rest] = path;
  const inside = { ...(values ?? {}) };
  if (rest.length) inside[key] = set(inside[key], rest, value);
  else inside[key] = value;
  if (inside[key] === undefined || (rest.length && !Object.keys(inside[key]).length)) delete inside[key];
  return inside;
};
const at = (values, path) => path.reduce((value, key) => value?.[key], values);

/** The keys of a schema as a flat list: [path, schema]. */
function keysOf(schema, root, path = []) {
  const whole = resolved(schema, root);
  if (!whole.properties) return [[path, whole]];
  return Object.entries(whole.properties).flatMap(([key, inside]) => keysOf(inside, root, [...path, key]));
}

function resolved(schema, root) {
  if (schema.$ref) return { ...resolved(root.$defs[schema.$ref.split("/").pop()], root), ...without(schema, "$ref") };
  const parts = (schema.anyOf ?? schema.allOf ?? []).filter((part) => part.type !== "null");
  const sections = parts.map((part) => resolved(part, root)).filter((part) => part.properties);
  if (parts.length === 1 || sections.length === 1)
    return { ...resolved(sections[0] ?? parts[0], root), ...without(schema, "anyOf", "allOf") };
  return schema;
}
const without = (value, ...keys) => Object.fromEntries(Object.entries(value).filter(([key]) => !keys.includes(key)));

/** What was typed, as the YAML would read it: numbers, true, false and null, lists and mappings (as JSON), else text. */
function read(text, schema) {
  if (text === "") return undefined;
  if (schema.type === "string") return text;
  if (text === "true" || text === "false") return text === "true";
  if (text === "null") return null;
  if (/^\s*[[{]/.test(text))
    try {
      return JSON.parse(text);
    } catch {
      return text; // not yet; until then the server says what is wrong
    }
  return text.trim() !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
}

const asText = (value) => (value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value));

function Input({ path, schema, value, onValue, ...described }) {
  const common = { ...described, name: path.join(".") };
  const shown = asText(value);
  const options = schema.enum ?? (schema.type === "boolean" ? [true, false] : null);
  if (options)
    return (
      <select {...common} value={shown} onChange={(event) => onValue(read(event.target.value, schema))}>
        <option value="">default ({asText(schema.default ?? "–")})</option>
        {options.map((option) => (
          <option key={option} value={String(option)}>
            {String(option)}
          </option>
        ))}
      </select>
    );
  const many = schema.type === "object" || schema.type === "array";
  const placeholder = schema.default == null ? (many ? "as JSON" : "") : asText(schema.default);
  return <Typed {...common} value={shown} placeholder={placeholder} onText={(text) => onValue(read(text, schema))} />;
}

function Section({ title, keys, values, errors, onValues, open }) {
  if (!keys.length) return null;
  return (
    <details open={open}>
      <summary>{title}</summary>
      <div class="form">
        {keys.map(([path, schema]) => {
          const name = path.join(".");
          const error = errors.find((each) => each.field === name || each.field?.startsWith(`${name}.`));
          return (
            <Field key={name} label={name} help={schema.description} error={error}>
              <Input
                path={path}
                schema={schema}
                value={at(values, path)}
                onValue={(value) => onValues((old) => set(schema.kind ? { ...old, objective: undefined } : old, path, value))}
              />
            </Field>
          );
        })}
      </div>
    </details>
  );
}

export function NewRun({ source = "" }) {
  const { value: schema, error } = useGet("/api/schema");
  const [name, setName] = useState("my-run");
  const [values, setValues] = useState({
    model: { path: "bundled:smollm2-135m-instruct" },
    data: { train: { source: source || "bundled:everyday" }, held_out: { fraction: 0.1 } },
    run: { folder: "runs/my-run" },
  });
  const [typed, setTyped] = useState(null);
  const [checked, setChecked] = useState({ yaml: "", errors: [], command: "" });
  const [job, setJob] = useState(null);
  const asked = typed === null ? { values, name } : { yaml: typed, name };
  const [start, busy, refused] = useAction(async (dry_run) => {
    setJob(null);
    const { id } = await post("/api/jobs", { id: newId(), verb: "train", train: { dry_run, name, yaml: typed ?? checked.yaml } });
    setJob({ id, dry_run });
  });
  const [check, , wrong] = useAction(async () => setChecked(await post("/api/recipe/check", asked)));
  useEffect(() => {
    const timer = setTimeout(check, 250);
    return () => clearTimeout(timer);
  }, [values, typed, name]);
  if (!schema) return error ? <Trouble error={error} /> : <Waiting />;
  const plain = keysOf(schema, schema).filter(([[section]]) => section !== "objective");
  const keys = [...plain, ...objective(schema, values.objective?.kind)];
  const isFirst = ([path]) => FIRST.includes(path.join("."));
  const sections = [...new Set(keys.map(([path]) => path[0]))];
  const known = (field) => keys.some(([path]) => field === path.join(".") || field?.startsWith(`${path.join(".")}.`));
  const others = checked.errors.filter((each) => !known(each.field));
  const part = (title, some, open) => (
    <Section key={title} title={title} keys={some} values={values} errors={checked.errors} onValues={setValues} open={open} />
  );
  return (
    <div class="halves">
      <div>
        <Field label="Name" help="of the recipe's file, and of the run's folder">
          <input
            value={name}
            onInput={(event) => {
              setName(event.target.value);
              setValues((old) => set(old, ["run", "folder"], `runs/${event.target.value}`));
            }}
          />
        </Field>
        <fieldset disabled={typed !== null}>
          <legend class="hidden">Recipe</legend>
          {part("Model and data", keys.filter(isFirst), true)}
          {sections.map((section) => part(`All of ${section}`, keys.filter((each) => each[0][0] === section && !isFirst(each)), false))}
        </fieldset>
      </div>
      <div>
        <Field label="Recipe (YAML)" help={typed === null ? "Written by the form. Edit it, and the form rests." : "Edited by hand."}>
          <textarea rows="18" spellcheck={false} value={typed ?? checked.yaml} onInput={(event) => setTyped(event.target.value)} />
        </Field>
        {typed !== null && (
          <button type="button" onClick={() => setTyped(null)}>
            Back to the form
          </button>
        )}
        {others.map((each, index) => (
          <Trouble key={index} error={{ message: each.field ? `${each.field}: ${each.message}` : each.message, hint: each.hint }} />
        ))}
        <Trouble error={wrong ?? refused} />
        {checked.downloads?.length > 0 && (
          <p class="panel finding unclear">Starting downloads from the Hub what is not in its cache: {checked.downloads.join(", ")}.</p>
        )}
        <Command>{checked.command}</Command>
        <p class="actions">
          <button type="button" disabled={busy || checked.errors.length > 0} onClick={() => start(true)}>
            Dry run
          </button>
          <button type="button" class="first" disabled={busy || checked.errors.length > 0} onClick={() => start(false)}>
            Start training
          </button>
        </p>
        {job && <Job key={job.id} id={job.id} />}
        {job && !job.dry_run && <a href={link("run", values.run?.folder ?? `runs/${name}`)}>See its curves</a>}
      </div>
    </div>
  );
}
