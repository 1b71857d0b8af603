// What happens in the browser alone. Gradio runs this file once; wiring.py calls the functions on `window`.

const one = selector => document.querySelector(selector);
const all = selector => [...document.querySelectorAll(selector)];
const words = () => JSON.parse(one("#vocabulary")?.textContent || "{}");

// The page is shown when no part of it has been added for a moment.
let settled;
const show = () => one("gradio-app")?.classList.add("ready");
const watcher = new MutationObserver(() => { clearTimeout(settled); settled = setTimeout(done, 150); });
const done = () => { if (!one("#arms img") && !one("#restore input")) return; watcher.disconnect(); show(); };
watcher.observe(document.body, { childList: true, subtree: true });
setTimeout(() => { watcher.disconnect(); show(); }, 4000);

// Whether prompts of the chosen model name an object alone.
window.takesClasses = () => words().class_models.includes(one("#settings input")?.value);

// A prompt of things the embedded models know.
window.surprise = () => {
  const pick = list => list[Math.floor(Math.random() * list.length)];
  const { objects, backgrounds } = words();
  if (takesClasses()) return pick(objects);
  const background = pick(backgrounds);
  return `${pick(objects)} on ${/^[aeiou]/.test(background) ? "an" : "a"} ${background} background`;
};

// The address follows what is shown, so that a reload or a copied link shows it again.
window.setAddress = query => {
  const url = new URL(location.href);
  url.search = query;
  url.searchParams.delete("__theme");
  history.replaceState(null, "", url);
  return url.href;
};

// Images that the settings would not make any more are greyed.
window.markStale = (madeFrom, values) => {
  if (!madeFrom) return;
  const same = (a, b) => (a ?? 0) == (b ?? 0);
  const stale = JSON.parse(madeFrom).some((value, i) => !same(value, values[i]));
  one("#arms")?.classList.toggle("stale", stale);
  one("#caption")?.classList.toggle("stale", stale);
};

// Enter starts a comparison from any field of the settings.
document.addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  if (!event.target.matches("#quick input, #settings input[type=number], #settings input[type=range], #settings textarea")) return;
  event.preventDefault();
  one("#generate").click();
});

// The blind test by keys, while its tab is open and nothing is being typed.
document.addEventListener("keydown", event => {
  const answer = { ArrowLeft: "left", ArrowRight: "right", 0: "neither" }[event.key];
  if (!answer || event.target.closest("input, textarea, select, [role=tab], [role=slider], .fullscreen")) return;
  const button = one(`#answer-${answer}`);
  if (!button?.offsetParent) return;
  event.preventDefault();
  button.click();
});

// Suggestions of known objects for the word that is being typed.
const suggest = textarea => {
  const box = one("#suggestions");
  const { objects = [], models = [] } = words();
  const known = models.includes(one("#settings input")?.value);
  const typed = textarea.value.split(/ on /)[0].toLowerCase().replace(/^(an?|the) /, "").trim();
  const found = known && typed.length > 1 && !/ on /.test(textarea.value)
    ? objects.filter(name => name.replace(/^an? /, "").split(" ").some(word => word.startsWith(typed)) || name.includes(typed)).slice(0, 8)
    : [];
  box.replaceChildren(...found.map(name => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = name;
    button.onclick = () => {
      const end = textarea.value.match(/ on .*/)?.[0] ?? "";
      textarea.value = name + end;
      textarea.dispatchEvent(new Event("input", { bubbles: true }));
      box.replaceChildren();
      textarea.focus();
    };
    return button;
  }));
};
document.addEventListener("input", event => { if (event.target.matches("#prompt textarea, #prompt input")) suggest(event.target); });

// Holding the button shows the other image in place of the refined one, right of the slider's line.
const flicker = hold => {
  const [other, refined] = all("#slide img");
  if (!refined) return;
  refined.dataset.own ??= refined.src;
  if (!hold) { refined.src = refined.dataset.own; delete refined.dataset.own; }
  else refined.src = other.src;
};
for (const [begin, end] of [["pointerdown", "pointerup"], ["keydown", "keyup"]]) {
  document.addEventListener(begin, event => {
    if (event.target.id !== "flicker" || event.repeat || (event.key && !" Enter".includes(event.key))) return;
    event.preventDefault();
    flicker(true);
    document.addEventListener(end, () => flicker(false), { once: true });
  });
}

// A range above some galleries moves through their images.
const flip = gallery => {
  const images = [...gallery.querySelectorAll(".thumbnail-item")];
  let box = gallery.parentElement.querySelector(".flip");
  if (images.length < 2) return box?.remove();
  if (!box) {
    box = document.createElement("div");
    box.className = "flip";
    box.innerHTML = "<img alt=''><label><span></span><input type='range' min='0' value='0' step='1'></label>";
    box.querySelector("input").oninput = () => flip(gallery);
    gallery.before(box);
  }
  const input = box.querySelector("input"), image = images[Math.min(input.value, images.length - 1)];
  input.max = images.length - 1;
  const caption = image.querySelector(".caption-label")?.textContent ?? "";
  if (box.querySelector("img").src !== image.querySelector("img").src) box.querySelector("img").src = image.querySelector("img").src;
  box.querySelector("img").alt = box.querySelector("span").textContent = caption;
};
setInterval(() => all(".flipped").forEach(flip), 400);

// Screen readers hear when a comparison is complete, and the names of links and pictures that Gradio only numbers.
const status = document.createElement("div");
status.setAttribute("role", "status");
status.className = "announcement";
document.body.append(status);
let told = "";
const tell = () => {
  const costs = all("#arms .cost").map(cost => cost.innerText);
  const now = costs.length && costs.some(cost => /forward/.test(cost)) && !costs.some(cost => /^forward/.test(cost)) ? costs.join("; ") : "";
  if (now && now !== told) { if (told) status.textContent = "Images ready"; told = now; }
  else if (!now && told) { status.textContent = "Making images"; told = " "; }
  all("a[download]").forEach(link => name(link, `Download ${link.download || "file"} ${link.innerText.trim()}`));
  all(".thumbnail-item:has(.caption-label)").forEach(image => name(image, image.innerText.trim()));
};
const name = (element, label) => { if (element.ariaLabel !== label) element.ariaLabel = label; };
setInterval(tell, 500);

// An image dropped anywhere on the page goes to the field that restores its settings.
const hasFile = event => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", event => { if (hasFile(event)) event.preventDefault(); });
document.addEventListener("drop", event => {
  const input = one("#restore input[type=file]");
  if (!hasFile(event) || event.target.closest("#restore")) return;
  event.preventDefault(); // the browser would open the image in place of the page
  if (!input) return;
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});
