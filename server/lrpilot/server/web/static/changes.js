// The changes that people can make to a run, one by one.

/** Kinds of adjustments that can be taken back. */
const ENDABLE = new Set([
  "multiply",
  "divide",
  "set",
  "curve",
  "hold",
  "decay",
  "stretch warmup",
  "scale weight decay",
]);

/** Return whether an adjustment can be taken back. */
export function mayBeUndone(item) {
  return ENDABLE.has(item.action) && ["planned", "in force"].includes(item.status) && !item.forgotten;
}

/**
 * Every change: `title` heads its dialog, `button` names it where it is offered, `words` are its command
 * line, and `fields` ask for the rest. `body` makes the fields of the request out of what was given.
 */
export const CHANGES = {
  hold: {
    title: "Hold LR and WD",
    button: "Hold…",
    about: "LR and WD stay as they are at the horizon until somebody releases them.",
    words: ["hold"],
    body: () => ({ hold: true }),
  },
  release: {
    title: "Release LR and WD",
    button: "Release…",
    about: "Ends every hold: LR and WD go back to the schedule at the progress reached by then.",
    words: ["release"],
    body: () => ({ release: true }),
  },
  approve: {
    title: "Approve an advice",
    button: "Approve…",
    about: "The advice becomes an adjustment at the horizon. Its own reason stands; yours is added.",
    words: ["approve"],
    body: (_, item) => ({ advice: item.id }),
  },
  undo: {
    title: "Take an adjustment back",
    button: "Take back…",
    about: "LR and WD go on as if it ended at the horizon.",
    words: ["adjust", "--undo", "ID"],
    fields: [{ name: "id", label: "Adjustment", choices: (run) => run.adjustments.filter(mayBeUndone).reverse() }],
    body: ({ id }) => ({ undo: id }),
  },
  scale_lr: {
    title: "Scale LR",
    about: "Multiplies the LR of every group, within the run's bounds.",
    words: ["adjust", "--scale-lr", "F"],
    fields: [{ name: "factor", label: "Factor", type: "number", value: "0.5" }],
    body: ({ factor }) => ({ scale_lr: Number(factor) }),
  },
  set_lr: {
    title: "Set LR",
    about: "Sets the LR of the first group, and scales the others alike.",
    words: ["adjust", "--set-lr", "X"],
    fields: [
      {
        name: "lr",
        label: "LR",
        type: "number",
        value: (run) => run.values[0]?.learning_rate ?? "",
      },
    ],
    body: ({ lr }) => ({ set_lr: Number(lr) }),
  },
  scale_weight_decay: {
    title: "Scale WD",
    about: "Multiplies the WD of every group.",
    words: ["adjust", "--scale-wd", "F"],
    fields: [{ name: "factor", label: "Factor", type: "number", value: "0.5" }],
    body: ({ factor }) => ({ scale_weight_decay: Number(factor) }),
  },
  begin_decay: {
    title: "Begin the decay",
    about: "Anneals the LR to its least value from the horizon on.",
    words: ["adjust", "--begin-decay", "LENGTH"],
    fields: [
      {
        name: "length",
        label: "Length",
        value: "10%",
        hint: (run) => `${run.unit}, or a share of the progress so far: 10%`,
      },
      { name: "style", label: "Style", choices: () => ["minus_sqrt", "exponential", "linear", "cosine"] },
    ],
    body: ({ length, style }) => ({ begin_decay: { length: length.trim(), style } }),
  },
  next_stage: {
    title: "Go on to the next stage",
    about: "Leaves the stage in force.",
    words: ["adjust", "--next-stage"],
    body: () => ({ next_stage: true }),
  },
  total: {
    title: "Change the planned length",
    about: "Decays, ramps and stages that ended with the run end with it still.",
    words: ["adjust", "--total", "N"],
    fields: [{ name: "total", label: "Total", type: "number", value: (run) => run.total, hint: (run) => run.unit }],
    body: ({ total }) => ({ total: Number(total) }),
  },
};

/** Those among which the dialog of "Adjust…" lets choose. */
export const ADJUSTMENTS = [
  "scale_lr",
  "set_lr",
  "scale_weight_decay",
  "begin_decay",
  "next_stage",
  "total",
  "undo",
];
