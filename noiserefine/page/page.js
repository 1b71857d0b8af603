// An image dropped anywhere on the page goes to the field that restores its settings.
const hasFile = event => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", event => { if (hasFile(event)) event.preventDefault(); });
document.addEventListener("drop", event => {
  const input = document.querySelector("#restore input[type=file]");
  if (!hasFile(event) || event.target.closest("#restore")) return;
  event.preventDefault(); // the browser would open the image in place of the page
  if (!input) return;
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});
