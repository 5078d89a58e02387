"use strict";
// Draws an answer: its tokens coloured by expert, each expert's share, and what is known of one token. Everything that
// comes from a model is set as text, never as markup. The objects are those of details.py and page.py.

const COLOURS = 7; // classes .e0 to .e6

/** An element with a class, text or children. */
function element(tag, className = "", ...children) {
  const node = document.createElement(tag);
  node.className = className;
  node.append(...children);
  return node;
}

/** Text in which white space and control characters can be seen. */
function visible(text) {
  return text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣").replace(/[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g, "�") || "∅";
}

/** A share of 1 as a percentage. */
function percent(share) {
  return share >= 0.9995 || share < 0.0005 ? `${Math.round(100 * share)} %` : `${(100 * share).toFixed(1)} %`;
}

/** The same in short. */
function rounded(share) {
  return share > 0 && share < 0.005 ? "<1 %" : `${Math.round(100 * share)} %`;
}

/** Scores as probabilities; null where one is not known. */
function softmax(scores) {
  if (scores.some((score) => score === null)) return null;
  const peak = Math.max(...scores);
  const weights = scores.map((score) => Math.exp(score - peak));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return weights.map((weight) => weight / total);
}

/** A button that goes from the system's colours to light and dark ones. */
function themeSwitch(button) {
  const themes = ["system", "light", "dark"];
  const set = (theme) => {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
  };
  let now = 0;
  set(themes[now]);
  button.addEventListener("click", () => set(themes[(now = (now + 1) % themes.length)]));
}

/** A list of names and numbers over bars. rows: [name, share, number as text, class, chosen]. */
function bars(rows) {
  const list = element("ul", "bars");
  for (const [name, share, number, className, chosen] of rows) {
    const row = element("li", `${className} ${chosen ? "chosen" : ""}`, element("span", "name", name), element("span", "", number));
    row.title = name;
    row.style.setProperty("--share", `${100 * share}%`);
    list.append(row);
  }
  return list;
}

class AnswerView {
  /** root: where the answer is drawn; details: where a token is explained. */
  constructor(root, details) {
    this.root = root;
    this.details = details;
  }

  /** Draw a whole answer. */
  show(answer) {
    this.begin(answer);
    for (const token of answer.tokens) this.add(token);
    this.finish(answer);
    if (answer.tokens.length) this.select(0, false, false);
  }

  /** Draw an answer that has no tokens yet; `add` and `finish` do the rest. */
  begin(answer) {
    this.answer = { ...answer, tokens: [] };
    this.counts = new Map();
    this.switches = 0;
    this.selected = null;
    this.chosen = false; // whether somebody points at tokens; else the newest is explained
    this.tokens = element("div", "tokens");
    this.tokens.setAttribute("role", "listbox");
    this.tokens.setAttribute("aria-label", "Tokens of the answer; arrow keys go from one to the next");
    this.tokens.setAttribute("aria-busy", "true");
    this.shares = element("div", "shares");
    this.shares.setAttribute("aria-hidden", "true");
    this.legend = element("ul", "legend");
    this.figures = element("ul", "figures");
    this.root.replaceChildren();
    if (answer.prompt) this.root.append(element("p", "prompt", answer.prompt));
    this.root.append(this.tokens, this.shares, this.legend, this.figures);
    for (const kind of ["mouseover", "focusin", "click"]) {
      this.tokens.addEventListener(kind, (event) => {
        const place = [...this.tokens.children].indexOf(event.target.closest(".token"));
        if (place >= 0) this.select(place, kind === "click");
      });
    }
    this.tokens.addEventListener("keydown", (event) => this.move(event));
    this.measure({});
  }

  /** The class of an expert's colour. */
  colour(expert) {
    const place = this.answer.experts.indexOf(expert);
    return place < 0 ? "other" : `e${place % COLOURS}`;
  }

  /** Draw one token more. */
  add(token) {
    const all = this.answer.tokens;
    if (all.length && all[all.length - 1].expert !== token.expert) this.switches += 1;
    this.counts.set(token.expert, (this.counts.get(token.expert) ?? 0) + 1);
    const place = all.push(token) - 1;
    const span = element("span", `token ${this.colour(token.expert)}`);
    if (token.text === "") span.append(element("span", "mark", "·"));
    else if (/^\s+$/.test(token.text)) span.append(element("span", "mark", visible(token.text)), token.text.includes("\n") ? "\n" : "");
    else span.append(token.text);
    span.setAttribute("role", "option");
    span.setAttribute("aria-selected", "false");
    span.setAttribute("aria-label", `${visible(token.text)}, ${token.expert}`);
    span.tabIndex = place === 0 ? 0 : -1;
    this.tokens.append(span);
  }

  /** Shares of the experts, and figures: `first_seconds`, `tokens_per_second`, `drafted`, `accepted`, `finish_reason`. */
  measure(figures) {
    Object.assign(this.answer, figures);
    const { tokens, experts, router, facts } = this.answer;
    const names = [...experts, ...[...this.counts.keys()].filter((name) => !experts.includes(name))];
    this.shares.replaceChildren();
    this.legend.replaceChildren();
    for (const name of names) {
      const count = this.counts.get(name) ?? 0;
      const share = tokens.length ? count / tokens.length : 0;
      const part = element("span", this.colour(name));
      part.style.flexGrow = count;
      if (count) this.shares.append(part);
      const label = name === router ? `${name} (the router, for an expert that failed)` : name;
      this.legend.append(element("li", "", element("span", `swatch ${this.colour(name)}`), `${label}: ${count} (${percent(share)})`));
    }
    const { first_seconds: first, tokens_per_second: speed, drafted, accepted, finish_reason: reason } = this.answer;
    const rows = [["tokens", tokens.length], ["switches", this.switches]];
    if (speed) rows.push(["tokens/s", speed.toFixed(1)]);
    if (first != null) rows.push(["to the first token", first < 1 ? `${Math.round(1000 * first)} ms` : `${first.toFixed(2)} s`]);
    if (drafted) rows.push(["drafts accepted", `${accepted} of ${drafted} (${percent(accepted / drafted)})`]);
    if (reason) rows.push(["ended by", reason]);
    for (const [name, value] of Object.entries(facts ?? {})) rows.push([name, value]);
    this.figures.replaceChildren(...rows.map(([name, value]) => element("li", "", `${name} `, element("b", "", String(value)))));
  }

  /** The answer is complete. */
  finish(figures) {
    this.tokens.setAttribute("aria-busy", "false");
    const { first_seconds, tokens_per_second, drafted, accepted, finish_reason } = figures;
    this.measure({ first_seconds, tokens_per_second, drafted, accepted, finish_reason });
  }

  /** Arrow keys, Home and End. */
  move(event) {
    const last = this.tokens.children.length - 1;
    const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -last, End: last };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const place = Math.max(0, Math.min(last, (this.selected ?? 0) + steps[event.key]));
    this.select(place, true);
  }

  /** Explain a token; with `focus` it takes the keyboard's focus too. */
  select(place, focus = false, chosen = true) {
    this.chosen ||= chosen;
    const spans = this.tokens.children;
    const before = spans[this.selected];
    if (before) {
      before.classList.remove("selected");
      before.setAttribute("aria-selected", "false");
      before.tabIndex = -1;
    }
    document.querySelectorAll(".token.selected").forEach((other) => other.classList.remove("selected"));
    if (spans[0]) spans[0].tabIndex = -1;
    this.selected = place;
    spans[place].classList.add("selected");
    spans[place].setAttribute("aria-selected", "true");
    spans[place].tabIndex = 0;
    if (focus && document.activeElement !== spans[place]) spans[place].focus();
    this.explain(this.answer.tokens[place], place);
  }

  explain(token, place) {
    const { experts, router } = this.answer;
    const colour = this.colour(token.expert);
    const head = element("h2", "", element("code", "", visible(token.text)));
    const who = element("p", "quiet", element("span", `swatch ${colour}`), `${token.expert} · token ${place + 1} of ${this.answer.tokens.length} · id ${token.id}`);
    const parts = [head, who];
    const shares = token.routing && softmax(token.routing);
    parts.push(element("h3", "", "Routing"));
    if (shares) {
      const rows = experts.map((name, row) => [name, shares[row], percent(shares[row]), this.colour(name), name === token.expert]);
      parts.push(bars(rows));
    } else parts.push(element("p", "quiet", "The router did not run."));
    if (token.candidates) {
      const columns = [["Router", "router", "other"], [token.expert === router ? "Expert" : token.expert, "expert", colour], ["Fusion", "fused", "fusion"]];
      const models = element("div", "models");
      for (const [title, key, className] of columns) {
        const rows = token.candidates[key].map(({ id, text, logprob }) => {
          const share = Math.exp(logprob ?? -Infinity);
          return [visible(text), share, rounded(share), className, id === token.id];
        });
        models.append(element("section", "", element("h3", "", title), rows.length ? bars(rows) : element("p", "quiet", "did not run")));
      }
      parts.push(models);
    }
    this.details.replaceChildren(...parts);
  }
}
