// Buttons that open and close dialogs.
document.addEventListener("click", (event) => {
  const opener = event.target.closest("[data-dialog]");
  if (opener) {
    const dialog = document.getElementById(opener.dataset.dialog);
    dialog.querySelector("form")?.reset();
    dialog.querySelector(".form-error")?.setAttribute("hidden", "");
    dialog.showModal();
  }
  event.target.closest("[data-close]")?.closest("dialog").close();
  if (event.target instanceof HTMLDialogElement && outside(event)) event.target.close();
});

/** A click on the backdrop is one on the dialog, but not within its box. */
function outside(event) {
  const box = event.target.getBoundingClientRect();
  const { clientX: x, clientY: y } = event;
  return x < box.left || x > box.right || y < box.top || y > box.bottom;
}
