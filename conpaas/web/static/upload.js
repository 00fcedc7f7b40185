// Code by upload: one archive as the body of one request, with progress.
import { complain, csrf, goOn, quieten } from "./actions.js";

let sending = null;

document.addEventListener("change", (event) => {
  if (event.target.name === "way") {
    for (const form of document.querySelectorAll("form.way")) form.hidden = form.id !== `way-${event.target.value}`;
  }
  if (event.target.id === "archive") showChosen(event.target);
});

function showChosen(input) {
  const [file] = input.files;
  document.getElementById("chosen").textContent = file
    ? `${file.name}, ${size(file.size)}`
    : "example: .zip, .tar of your source tree";
}

function size(bytes) {
  return bytes < 1 << 20 ? `${Math.max(1, Math.round(bytes / 1024))} KB` : `${(bytes / (1 << 20)).toFixed(1)} MB`;
}

document.addEventListener("submit", (event) => {
  const form = event.target;
  if (!form.matches("[data-upload]")) return;
  event.preventDefault();
  const [file] = form.querySelector("input[type=file]").files;
  quieten(form);
  if (file) send(form, file);
});

function send(form, file) {
  const room = document.getElementById("upload-progress");
  const [bar, words] = [room.querySelector("progress"), room.querySelector("[role=status]")];
  const button = form.querySelector("button.primary");
  const request = new XMLHttpRequest();
  const end = (act) => () => {
    sending = null;
    room.hidden = true;
    button.disabled = false;
    act?.();
  };
  sending = request;
  room.hidden = false;
  button.disabled = true;
  bar.value = 0;
  words.textContent = "0 %";
  request.upload.addEventListener("progress", (event) => {
    if (!event.lengthComputable) return;
    bar.value = (100 * event.loaded) / event.total;
    words.textContent = event.loaded === event.total ? "checking…" : `${Math.round(bar.value)} %`;
  });
  request.addEventListener(
    "load",
    end(() => finish(form, request)),
  );
  request.addEventListener(
    "error",
    end(() => complain(form, { detail: "the upload was cut off", hint: "nothing is stored: try again" })),
  );
  request.addEventListener("abort", end());
  request.open("POST", `${form.action}?${new URLSearchParams({ filename: file.name })}`);
  request.setRequestHeader("Accept", "application/json");
  request.setRequestHeader("X-CSRF-Token", csrf());
  request.setRequestHeader("Content-Type", "application/octet-stream");
  request.send(file);
}

function finish(form, request) {
  let words = { detail: "there is no answer that can be read", hint: "try again" };
  try {
    words = JSON.parse(request.responseText);
  } catch {
    return complain(form, words);
  }
  if (request.status >= 400) return complain(form, words);
  form.reset();
  showChosen(form.querySelector("input[type=file]"));
  return goOn(form, words);
}

document.addEventListener("click", (event) => {
  if (event.target.closest("#upload-cancel")) sending?.abort();
});

for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    const room = event.target.closest?.(".drop");
    if (!room) return;
    event.preventDefault();
    room.classList.toggle("over", kind === "dragover");
    if (kind === "drop" && event.dataTransfer.files.length) {
      const input = room.querySelector("input");
      input.files = event.dataTransfer.files;
      showChosen(input);
    }
  });
}
