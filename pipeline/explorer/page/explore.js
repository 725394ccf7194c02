// The page: choosing and drawing images, and the models that look at them.

import { ask, latest, tell } from "/asking.js";
import { Card } from "/card.js";
import { Drawing } from "/drawing.js";
import { count, described, element, paint, picture, toText } from "/elements.js";

const PAGE = 40;  // thumbnails
const GREYS = ["#ffffff", "#aaaaaa", "#555555", "#000000"];
const COLOURS = ["#ffffff", "#000000", "#d03b3b", "#eb8f34", "#f2d13c", "#3c9a4b", "#3b77d0",
                 "#7d4fb0", "#8b5a3c"];
const find = id => document.getElementById(id);
const state = { first: null, second: null, active: "first", seed: 0, start: 0 };
let about, shape, drawing, cards = [];

// The bars of all models have one scale.
function compare() {
  const known = cards.filter(card => card.code);
  const length = ({ code }) => Math.max(0, code.rate_bits) + Math.max(0, code.distortion_bits);
  const most = Math.max(...known.map(length));
  known.forEach(card => card.showBar(most));
}

// --- choosing an image -------------------------------------------------------------------------

// ``image`` is what is asked about; ``shown`` is how it looks and what it is called.
function choose(image, shown) {
  const slot = state[state.active] = { image, pixels: shown.pixels };
  const button = find(state.active);
  tell("");
  paint(button.querySelector("canvas"), slot.pixels, shape);
  const caption = shown.sample === undefined ? "your drawing" : described(shown);
  button.querySelector("i").textContent = caption;
  markThumbs();
  for (const card of cards) {
    if (state.active === "first") {
      Object.assign(card, { moved: {}, isMoving: false });
      card.askCode();
      card.askDrawn();
      card.askNear();
    }
    if (state.first && state.second) card.askWalk();
  }
}

function activate(name) {
  state.active = name;
  for (const each of ["first", "second"]) find(each).setAttribute("aria-pressed", each === name);
}

const askPage = latest(async () => {
  const { images } = await ask("images", { start: state.start, count: PAGE });
  find("thumbs").replaceChildren(...images.map(image => {
    const title = described(image);
    const button = element("button", { type: "button", className: "thumb", title },
      picture(image.pixels, shape));
    button.dataset.sample = image.sample;
    button.addEventListener("click", () => choose({ sample: image.sample }, image));
    return button;
  }));
  const last = state.start + images.length - 1;
  find("range").textContent = `${count(state.start)} – ${count(last)} of ${count(about.images)}`;
  find("previous").disabled = state.start === 0;
  find("next").disabled = state.start + PAGE >= about.images;
  markThumbs();
});

function markThumbs() {
  for (const thumb of find("thumbs").children) {
    for (const slot of ["first", "second"]) {
      thumb.classList.toggle(slot, state[slot]?.image.sample === Number(thumb.dataset.sample));
    }
  }
}

async function goTo(sample) {
  state.start = Math.floor(sample / PAGE) * PAGE;
  askPage();
  const { images } = await ask("images", { start: sample, count: 1 });
  choose({ sample }, images[0]);
}

function turnPage(pages) {
  tell("");
  state.start = Math.max(0, Math.min(state.start + pages * PAGE, about.images - 1));
  askPage();
}

async function search(event) {
  event.preventDefault();
  tell("");
  const text = find("wanted").value.trim();
  if (!text) return;
  try {
    const after = state[state.active]?.image.sample ?? -1, isNumber = /^\d{1,15}$/.test(text);
    const sample = isNumber ? Number(text) : (await ask("find", { text, after })).sample;
    if (sample >= about.images) {
      throw new Error(`there is no image ${text}; the last one is ${about.images - 1}`);
    }
    await goTo(sample);
  } catch (error) {
    tell(error.message);
  }
}

// --- drawing -----------------------------------------------------------------------------------

function useDrawing() {
  const pixels = toText(drawing.pixels());
  choose({ pixels }, { pixels });
}

// ``isLight``: whether the images are dark on light, as drawings then are.
function setUpDrawing(isLight) {
  const ends = isLight ? ["#ffffff", "#000000"] : ["#000000", "#ffffff"];
  drawing = new Drawing(find("paper"), shape, useDrawing, ends);
  for (const colour of shape[0] === 3 ? COLOURS : about.binary ? ends : GREYS) {
    const checked = colour === drawing.colour;
    const input = element("input", { type: "radio", name: "colour", checked });
    input.setAttribute("aria-label", colour);
    input.style.backgroundColor = colour;
    input.addEventListener("change", () => { drawing.colour = colour; });
    find("colours").append(input);
  }
  find("brush").value = drawing.brush = shape[2] / 14;
  find("brush").addEventListener("input", event => { drawing.brush = Number(event.target.value); });
  find("fill").addEventListener("click", () => { drawing.fill(drawing.colour); useDrawing(); });
  find("copy").addEventListener("click", () => {
    drawing.show(picture(state[state.active].pixels, shape), false);
    useDrawing();
  });
  find("file").addEventListener("change", async event => {
    const [file] = event.target.files;
    event.target.value = "";  // so that the same file can be opened again
    if (!file) return;
    try {
      drawing.show(await createImageBitmap(file), true);
    } catch {
      tell(`${file.name} is no picture that this browser can read; open a PNG or JPEG file`);
      return;
    }
    useDrawing();
  });
}

function openTab(name) {
  for (const each of ["pick", "draw"]) {
    find(each).hidden = each !== name;
    find(`tab-${each}`).setAttribute("aria-selected", each === name);
  }
}

// --- the page ----------------------------------------------------------------------------------

// Says what the images are and what is known of them; returns whether more will be.
function tellAbout({ encoded, to_encode, resolutions, problem }) {
  const [channels, height, width] = shape, isEncoding = !problem && encoded < to_encode;
  const kind = channels === 3 ? "in colour" : about.binary ? "in black and white" : "in grey";
  const progress = problem ? ` ${problem}.`
    : isEncoding ? ` ${count(encoded)} of the first ${count(to_encode)} are encoded.` : "";
  find("about").textContent = `${count(about.images)} ${about.split} images of data set `
    + `${about.dataset}, ${width} × ${height}, ${kind}.${progress}`;
  cards.forEach((card, place) => card.showResolution(resolutions[place]));
  return !problem && (isEncoding || resolutions.includes(null));
}

// What is known of the latents, and the neighbours, improve until all images are encoded. Then the
// resolutions are measured.
async function follow() {
  try {
    if (!tellAbout(about)) return;
    let isEncoding = about.encoded < about.to_encode, goesOn = true;
    while (goesOn) {
      await new Promise(resolve => setTimeout(resolve, 1000));
      const known = await ask("progress");
      goesOn = tellAbout(known);
      if (isEncoding && (known.encoded === known.to_encode || !goesOn)) {
        isEncoding = false;
        for (const card of cards) {
          card.askCode();
          card.askNear();
        }
      }
    }
  } catch (error) {
    tell(error.message);
  }
}

async function start() {
  about = await ask("start");
  shape = about.shape;
  const page = { about, chosen: state, choose, compare };
  cards = about.models.map((model, place) => new Card(place, page));
  find("cards").append(...cards.map(card => card.box));
  find("near").append(...cards.map(card => card.row(card.near)));
  find("walk").append(...cards.map(card => card.row(card.walk)));
  find("wanted").placeholder = about.named ? "number or name" : "number";
  document.querySelector("main").hidden = false;
  find("find").addEventListener("submit", search);
  find("previous").addEventListener("click", () => turnPage(-1));
  find("next").addEventListener("click", () => turnPage(1));
  for (const name of ["pick", "draw"]) {
    find(`tab-${name}`).addEventListener("click", () => openTab(name));
  }
  for (const name of ["first", "second"]) {
    find(name).addEventListener("click", () => activate(name));
  }
  find("again").addEventListener("click", () => {
    state.seed++;
    for (const card of cards) {
      card.askDrawn();
      card.askWalk();
    }
  });
  await askPage();
  const { images } = await ask("images", { start: 0, count: 2 });
  setUpDrawing(atob(images[0].pixels).charCodeAt(0) > 127);  // by a corner of the first image
  activate("second");
  choose({ sample: images.at(-1).sample }, images.at(-1));
  activate("first");
  choose({ sample: 0 }, images[0]);
  follow();
}

start().catch(error => tell(error.message));
