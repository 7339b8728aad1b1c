// The dialog of a change: what, why and who; then what it would do; then it is done, once.

import { ApiError } from "./api.js";
import { CHANGES } from "./changes.js";
import { element } from "./dom.js";
import { changeList, valueTable } from "./effect.js";
import { count } from "./format.js";
import { drawEffect } from "./picture.js";

const AUTHOR_KEY = "lrpilot.author";

/** How long a plan that changed meanwhile is seen before it can be confirmed, in milliseconds. */
const LOOK_MS = 1_000;

/** Waits between tries of a call that may or may not have been carried out, in milliseconds. */
const RETRY_MS = [500, 2_000];

const CHANGED = "Nothing was done: the plan has changed since the dry run.";

let numbers = 0;

export class ChangeDialog {
  #context;
  #item;
  #kind;
  /** The answer of the dry run that is seen; null: none, or something was changed since. */
  #seen = null;
  /** The request that is on its way, or that may have been carried out; null: none. */
  #order = null;
  #isBusy = false;
  #endPicture = () => {};

  /** Open it for a change of one of `kinds`, of `item` where it is about an adjustment. */
  constructor(context, kinds, item = null) {
    this.#context = context;
    this.#item = item;
    this.#kind = kinds[0];
    const id = (name) => `change-${numbers}-${name}`;
    numbers += 1;
    this.title = element("h2", { id: id("title") });
    this.about = element("p", { class: "faint" });
    this.what = element(
      "select",
      { id: id("what"), onchange: () => this.#choose(this.what.value) },
      kinds.map((kind) => element("option", { value: kind, text: CHANGES[kind].title })),
    );
    this.fields = element("div", { class: "fields" });
    const isOptional = this.#kind === "approve";
    this.reason = element("textarea", {
      id: id("reason"),
      rows: "2",
      maxlength: "500",
      required: !isOptional,
      onkeydown: (event) => {
        // One line is the rule: Enter goes on, as in the other fields.
        if (event.key !== "Enter" || event.shiftKey) return;
        event.preventDefault();
        this.form.requestSubmit(this.look);
      },
    });
    this.author = element("input", { id: id("author"), required: true, maxlength: "200", autocomplete: "off" });
    this.look = element("button", { class: "button", type: "submit", text: "Show what it would do" });
    this.form = element(
      "form",
      {
        onsubmit: (event) => {
          event.preventDefault();
          this.#tryOut();
        },
      },
      kinds.length > 1 && labelled("What", this.what),
      this.about,
      this.fields,
      labelled(isOptional ? "Reason (beside that of the advice)" : "Reason", this.reason),
      labelled("Author", this.author),
      this.look,
    );
    this.notice = element("div", { class: "notice", role: "alert", hidden: true });
    this.effect = element("div", { class: "effect" });
    this.confirm = element("button", {
      class: "button primary",
      type: "button",
      hidden: true,
      onclick: () => this.#carryOut(),
    });
    this.cancel = element("button", {
      class: "button",
      type: "button",
      text: "Cancel",
      onclick: () => this.dialog.close(),
    });
    this.dialog = element(
      "dialog",
      { class: "change", "aria-labelledby": this.title.id, onclose: () => this.#end() },
      this.title,
      this.form,
      this.notice,
      this.effect,
      element("div", { class: "acts end" }, this.confirm, this.cancel),
    );
    this.form.addEventListener("input", (event) => {
      // Why and who change no number.
      if (event.target !== this.reason && event.target !== this.author) this.#unsee();
    });
    this.author.value = remembered() ?? context.api.server?.author ?? "";
    this.#choose(this.#kind);
    document.body.append(this.dialog);
    this.dialog.showModal();
    (this.fields.querySelector("input, select") ?? this.reason).focus();
  }

  #choose(kind) {
    this.#kind = kind;
    const { title, about, fields = [] } = CHANGES[kind];
    const what = this.what.options.length > 1 ? "Adjust" : title;
    this.title.textContent = `${what}: ${this.#context.name}`;
    this.about.textContent = this.#item && kind === "approve" ? `${this.#item.summary}. ${about}` : about;
    this.fields.replaceChildren(...fields.map((field) => this.#field(field)));
    this.#unsee();
  }

  #field({ name, label, type = "text", value = "", choices = null, hint = null }) {
    const run = this.#context.run;
    const id = `${this.title.id}-${name}`;
    let control;
    if (choices) {
      control = element(
        "select",
        { id, name, required: true },
        choices(run).map((choice) =>
          typeof choice === "string"
            ? element("option", { value: choice, text: choice })
            : element("option", { value: choice.id, text: `${choice.summary}, ${choice.id}` }),
        ),
      );
      if (this.#item) control.value = this.#item.id;
    } else {
      const isNumber = type === "number";
      control = element("input", {
        id,
        name,
        type,
        step: isNumber ? "any" : null,
        min: isNumber ? "0" : null,
        required: true,
        value: typeof value === "function" ? value(run) : value,
      });
    }
    return labelled(label, control, hint?.(run));
  }

  /** Show nothing of an effect that is no longer that of what stands in the fields. */
  #unsee() {
    this.#seen = null;
    this.#order = null;
    this.#endPicture();
    this.#endPicture = () => {};
    this.effect.replaceChildren();
    this.confirm.hidden = true;
    this.#say(null);
  }

  #wish() {
    const given = Object.fromEntries(
      [...this.fields.querySelectorAll("input, select")].map((field) => [field.name, field.value]),
    );
    return {
      ...CHANGES[this.#kind].body(given, this.#item),
      reason: this.reason.value.trim(),
      author: this.author.value.trim(),
    };
  }

  #call(body) {
    const { api, name } = this.#context;
    return this.#kind === "approve" ? api.approve(name, body) : api.adjust(name, body);
  }

  /** Show what the change would do; `isAnew`: it would have been made, but the plan had changed. */
  async #tryOut(isAnew = false) {
    if (this.#isBusy || !this.#isFilledIn()) return;
    this.#unsee();
    this.#setBusy(true);
    try {
      const answer = await this.#call({ ...this.#wish(), dry_run: true });
      if (!this.dialog.open) return;
      this.#showEffect(answer);
      if (isAnew) this.#say({ tone: "warn", text: `${CHANGED} Below is what it would do now.` });
    } catch (error) {
      const text = isAnew ? `${CHANGED} ${error.message}` : error.message;
      this.#say({ tone: "bad", text, fields: error.fields });
    } finally {
      this.#setBusy(false);
    }
    if (!this.heading?.isConnected) return;
    this.heading.focus({ preventScroll: true });
    this.heading.scrollIntoView({ block: "start" });
  }

  #isFilledIn() {
    // Blanks alone are no reason.
    this.reason.value = this.reason.value.trim();
    this.author.value = this.author.value.trim();
    return this.form.reportValidity();
  }

  #showEffect(answer) {
    if (answer.unchanged) {
      this.heading = element("h3", { tabindex: "-1", text: "Nothing to do: it is so already." });
      this.effect.replaceChildren(this.heading);
      return;
    }
    this.#seen = answer;
    const what = answer.adjustment?.summary ?? "new spec";
    this.heading = element("h3", {
      tabindex: "-1",
      text: `Dry run, nothing changed: ${what} from ${count(answer.effective)} on`,
    });
    const picture = element("div", { class: "picture" });
    this.effect.replaceChildren(
      this.heading,
      ...(answer.pending
        ? [
            element("p", {
              class: "notice",
              dataset: { tone: "warn" },
              text:
                "Leader mode: the job may have gone on alone beyond that. If it has, the change shows behind " +
                "the last step that it used alone.",
            }),
          ]
        : []),
      picture,
      ...(answer.changes?.length ? [changeList(answer.changes)] : []),
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Values" }, valueTable(answer)),
      element("p", {
        class: "faint",
        text: "It takes effect at the horizon of the moment of your confirmation, which moves as the run trains.",
      }),
    );
    this.#endPicture = drawEffect(picture, answer);
    this.confirm.textContent = `Confirm: ${what}`;
    this.confirm.hidden = false;
  }

  /** Make the change that is seen. A call without an answer is sent again as it was: it is made once. */
  async #carryOut() {
    if (this.#isBusy || !this.#seen || !this.#isFilledIn()) return;
    this.#order ??= { ...this.#wish(), etag: this.#seen.run.etag, request_id: freshId() };
    const { summary } = this.#seen.adjustment ?? { summary: "new spec" };
    remember(this.author.value);
    this.#setBusy(true);
    this.#lock(true);
    this.#say(null);
    let answer;
    try {
      answer = await this.#send(this.#order);
    } catch (error) {
      this.#setBusy(false);
      if (isUncertain(error)) this.#leaveOpen(error);
      else this.#refused(error);
      return;
    }
    this.#order = null;
    this.#succeed(answer, summary);
  }

  async #send(order) {
    for (const wait of RETRY_MS) {
      try {
        return await this.#call(order);
      } catch (error) {
        if (!isUncertain(error)) throw error;
        this.#say({ tone: "warn", text: "No answer. The same request is sent again." });
        await new Promise((done) => setTimeout(done, wait));
      }
    }
    return this.#call(order);
  }

  #succeed(answer, summary) {
    const later = answer.pending ? ", or later if the job has gone on alone" : "";
    const id = answer.adjustment ? ` (${answer.adjustment.id})` : "";
    const text = answer.unchanged
      ? "Nothing was done: it is so already."
      : `Done: ${summary} from ${count(answer.effective)} on${later}${id}.`;
    this.dialog.close();
    this.#context.say(text);
    this.#context.setRun(answer.run);
    if (answer.adjustment) this.#context.select(answer.adjustment.id);
  }

  /** Nobody knows whether it was made: only the same request may follow. */
  #leaveOpen(error) {
    this.#lock(true);
    this.confirm.textContent = "Send again";
    this.#say({
      tone: "bad",
      text: `${error.message} The change may have been made or not. Sending again makes it once at most.`,
    });
  }

  #refused(error) {
    this.#order = null;
    if (!this.dialog.open) {
      this.#context.say(`Nothing was done: ${error.message}`);
      return;
    }
    this.#lock(false);
    if (error.reason === "PlanChanged") {
      this.#showAnew();
      return;
    }
    this.#unsee();
    this.#say({ tone: "bad", text: error.message, fields: error.fields });
  }

  async #showAnew() {
    await this.#tryOut(true);
    // The second click of a double click confirms nothing that was not seen.
    this.confirm.disabled = true;
    setTimeout(() => {
      this.confirm.disabled = this.#isBusy;
    }, LOOK_MS);
  }

  #lock(isLocked) {
    for (const field of this.form.elements) field.disabled = isLocked;
  }

  #setBusy(isBusy) {
    this.#isBusy = isBusy;
    this.dialog.setAttribute("aria-busy", String(isBusy));
    this.look.disabled = isBusy;
    this.confirm.disabled = isBusy;
  }

  #say(notice) {
    this.notice.hidden = notice === null;
    if (notice === null) return;
    this.notice.dataset.tone = notice.tone;
    this.notice.replaceChildren(
      element("p", { text: notice.text }),
      ...(notice.fields ?? []).map((item) => element("p", { text: `${item.field}: ${item.text}` })),
    );
  }

  #end() {
    this.#endPicture();
    this.dialog.remove();
    if (this.#order !== null) {
      this.#context.say("Whether the change was made is not known: the event log shows it once the server answers.");
    }
  }
}

function labelled(text, control, hint = null) {
  const hintId = `${control.id}-hint`;
  if (hint) control.setAttribute("aria-describedby", hintId);
  return element(
    "div",
    { class: "field" },
    element("label", { for: control.id, text }),
    control,
    hint && element("span", { id: hintId, class: "faint", text: hint }),
  );
}

/** Return whether a call may have been carried out although it failed. */
function isUncertain(error) {
  return !(error instanceof ApiError) || error.status === 0 || error.status >= 500;
}

/** Return a random id, also where the page came over plain HTTP and `crypto.randomUUID` is missing. */
function freshId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return `page-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

function remembered() {
  try {
    return localStorage.getItem(AUTHOR_KEY);
  } catch {
    return null; // Storage is refused.
  }
}

function remember(author) {
  try {
    localStorage.setItem(AUTHOR_KEY, author);
  } catch {
    // As above.
  }
}
