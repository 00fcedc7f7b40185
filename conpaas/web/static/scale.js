// The buttons of the roles: what is to be added or removed is gathered here and sent by `submit`.
const WORD = /^[+-]?[0-9]+$/;
const staged = new Map();

/** Return the change that was written, or throw what is wrong with it. */
export function read(text, { role, dedicated, minimum, maximum }) {
  const word = text.trim();
  if (!WORD.test(word))
    throw new Error(
      word
        ? `“${word.slice(0, 40)}” is not a number of instances: write +1 to add one, -2 to remove two`
        : "write a number, such as +1 or -2",
    );
  const change = Number(word);
  if (change === 0) throw new Error(`“${word}” changes nothing: write +1 or more, -1 or less`);
  if (dedicated + change > maximum)
    throw new Error(
      `${word.replace("+", "")} are too many: at most ${maximum} instances can be ${role}, so at most ${maximum - dedicated} more`,
    );
  if (dedicated + change < minimum) {
    const spare = dedicated - minimum;
    throw new Error(
      spare > 0
        ? `only ${spare} ${role} can be removed: ${minimum} must stay`
        : `no ${role} instance can be removed: ${minimum ? `${minimum} must stay` : "there is none of its own"}`,
    );
  }
  return change;
}

function facts(button) {
  const { role, dedicated, minimum, maximum } = button.dataset;
  return { role, dedicated: Number(dedicated), minimum: Number(minimum), maximum: Number(maximum) };
}

function show() {
  const form = document.getElementById("scale");
  if (!form) return;
  let sum = 0;
  for (const button of form.querySelectorAll("[data-role]")) {
    const change = staged.get(button.dataset.role) ?? 0;
    button.querySelector(".delta").textContent = change ? signed(change) : "";
    button.classList.toggle("staged", change !== 0);
    form.querySelector(`input[name="${button.dataset.role}"]`)?.remove();
    if (change)
      form.append(
        Object.assign(document.createElement("input"), {
          type: "hidden",
          name: button.dataset.role,
          value: signed(change),
        }),
      );
    sum += change;
  }
  form.querySelector("button.primary").disabled = staged.size === 0;
  document.getElementById("scale-sum").textContent = staged.size === 0 ? "" : words(sum, place(form).dataset);
}

const signed = (number) => (number > 0 ? `+${number}` : `${number}`);

/** The option of the chosen cloud, or the form itself where there is but one. */
const place = (form) => form.querySelector("#scale-cloud")?.selectedOptions[0] ?? form;

/** Say an amount as the pages do: from two to four decimals. */
const amount = (number) =>
  number.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 4, useGrouping: false });

function words(sum, { price, currency }) {
  if (sum === 0) return "as many instances as now, with other roles";
  const count = Math.abs(sum);
  const money = price ? ` and ${amount(count * Number(price))} ${currency}` : "";
  return `about ${count} instance${count === 1 ? "" : "s"} ${sum > 0 ? "more" : "fewer"}, ${count} credit${count === 1 ? "" : "s"}${money} per hour ${sum > 0 ? "more" : "less"}`;
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-role]");
  if (!button) return;
  const dialog = document.getElementById("role-dialog");
  dialog.dataset.for = button.dataset.role;
  document.getElementById("role-title").textContent = button.dataset.role;
  document.getElementById("role-about").textContent = button.title;
  document.getElementById("role-error").hidden = true;
  const field = document.getElementById("role-number");
  field.value = staged.has(button.dataset.role) ? signed(staged.get(button.dataset.role)) : "";
  dialog.showModal();
  field.focus();
  field.select();
});

document.addEventListener("submit", (event) => {
  if (event.target.id !== "role-form") return;
  event.preventDefault();
  const dialog = document.getElementById("role-dialog");
  const button = document.querySelector(`[data-role="${dialog.dataset.for}"]`);
  const error = document.getElementById("role-error");
  try {
    staged.set(dialog.dataset.for, read(document.getElementById("role-number").value, facts(button)));
  } catch (wrong) {
    error.textContent = wrong.message;
    error.hidden = false;
    document.getElementById("role-number").select();
    return;
  }
  dialog.close();
  show();
  document.querySelector("#scale button.primary").focus();
});

document.addEventListener("change", (event) => {
  if (event.target.id === "scale-cloud") show();
});

document.addEventListener("conpaas:done", (event) => {
  if (event.target.id !== "scale") return;
  staged.clear();
  show();
});
document.addEventListener("conpaas:morphed", show);
