import { Drawing } from "/drawing.js";
import { paint, picture, toText } from "/images.js";

const PAGE = 40, DRAWN = 4, STEPS = 9, NEAREST = 12, LATENTS = 8;
const DRAWS = 32, QUICK_DRAWS = 8;  // drawings that the mean is of: at rest, and while something moves
const REACH = 3;  // standard deviations from the middle of a slider to its ends
const STEP = 0.05;

const find = id => document.getElementById(id);
const number = new Intl.NumberFormat("en");
const secret = location.hash.slice(1);
let about, shape, drawing, cards = [];
const state = { first: null, second: null, active: "first", seed: 0, start: 0, isDrawing: false };

// --- asking ------------------------------------------------------------------------------------

let pending = 0;

async function ask(what, question = {}) {
  document.body.classList.toggle("busy", ++pending > 0);
  try {
    const answer = await fetch(`/api/${what}`, {
      method: "POST", body: JSON.stringify(question),
      headers: { "Authorization": `Bearer ${secret}`, "Content-Type": "application/json" },
    }).catch(() => { throw new Error("vlae explore has stopped; start it again and open the address that it prints"); });
    const values = await answer.json();
    if (!answer.ok) throw new Error(values.error);
    tell("");
    return values;
  } finally {
    document.body.classList.toggle("busy", --pending > 0);
  }
}

function tell(problem) {
  find("problem").textContent = problem;
  find("problem").hidden = !problem;
}

// One question at a time; of what changes while it is answered, only the last state is asked about.
function latest(work) {
  let isRunning = false, isStale = false;
  return async () => {
    isStale = true;
    if (isRunning) return;
    isRunning = true;
    try {
      while (isStale) {
        isStale = false;
        await work();
      }
    } catch (error) {
      tell(error.message);
    } finally {
      isRunning = false;
    }
  };
}

// --- elements ----------------------------------------------------------------------------------

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function bits(value, error) {
  const digits = Math.abs(value) < 100 ? 1 : 0;
  const tail = error === undefined ? "" : ` ± ${error.toFixed(digits)}`;
  return `${value.toFixed(digits)}${tail}`;
}

const bytes = value => `${number.format(Number((value / 8).toFixed(value < 800 ? 1 : 0)))} bytes`;

// Puts images into a row, in the canvases that are there already: they do not flicker.
function fillRow(row, texts) {
  while (row.children.length > texts.length) row.lastChild.remove();
  texts.forEach((text, place) => {
    if (!row.children[place]) row.append(picture());
    paint(row.children[place], text, shape);
  });
}

// --- a model -----------------------------------------------------------------------------------

class Card {
  constructor(model, place) {
    this.model = model;
    this.place = place;
    this.moved = {};
    this.isMoving = false;
    this.showsAll = false;
    this.seen = picture();
    this.mean = picture();
    this.drawn = element("div", { className: "drawn" });
    this.caption = element("figcaption");
    this.rows = element("tbody");
    this.bar = element("div", { className: "bar" }, element("i"), element("i"));
    this.sliders = element("div", { className: "sliders" });
    this.back = element("button", { type: "button", textContent: "Put back", disabled: true });
    this.more = element("button", { type: "button" });
    this.back.addEventListener("click", () => this.move({}));
    this.more.addEventListener("click", () => { this.showsAll = !this.showsAll; this.showLatents(); });
    this.box = element("article", { className: "card" },
      element("h3", { textContent: model.name }),
      element("p", { className: "note", textContent: model.about }),
      element("div", { className: "parts" },
        element("div", { className: "pictures" },
          element("figure", { className: "original" }, this.seen,
            element("figcaption", { textContent: "the image as the model sees it" })),
          element("figure", {}, this.mean, this.caption),
          this.drawn,
          element("table", {}, this.rows), this.bar),
        element("div", { className: "latents" },
          element("h4", { textContent: "Latents, the most telling first " }, this.back),
          this.sliders, this.more)));
    this.askCode = latest(() => this.loadCode());
    this.askDrawn = latest(() => this.loadDrawn());
    this.askNear = latest(() => this.loadNear());
    this.askWalk = latest(() => this.loadWalk());
    this.near = element("div", { className: "strip" });
    this.walk = element("div", { className: "strip" });
    this.ends = [picture(), picture()];
    this.ends.forEach(end => end.classList.add("end"));
  }

  question(values = {}) {
    return { model: this.place, image: state.first.image, seed: state.seed, ...values };
  }

  async loadCode() {
    const code = await ask("code", this.question());
    this.code = code;
    paint(this.seen, code.seen, shape);
    paint(this.ends[0], code.seen, shape);
    const rows = [
      ["rate", "rate: the code", code.rate_bits, code.rate_bits_se, bytes(code.rate_bits)],
      ["distortion", "distortion: the pixels", code.distortion_bits, code.distortion_bits_se, ""],
      ["", "together, without loss", code.code_length_bits, code.code_length_bits_se,
       `${bytes(code.code_length_bits)} of ${bytes(this.model.raw_bits)}`],
    ];
    this.rows.replaceChildren(...rows.map(([kind, label, value, error, length]) => element("tr", {},
      element("td", {}, element("i", { className: kind }), label),
      element("td", { textContent: `${bits(value)} bits`, title: `${bits(value, error)} bits` }),
      element("td", { textContent: length }))));
    showBars();
    this.showLatents();
  }

  showBar(most) {
    const [rate, distortion] = this.bar.children;
    rate.style.width = `${100 * Math.max(0, this.code.rate_bits) / most}%`;
    distortion.style.width = `${100 * Math.max(0, this.code.distortion_bits) / most}%`;
  }

  async loadDrawn() {
    const draws = this.isMoving ? QUICK_DRAWS : DRAWS;
    const answer = await ask("redraw", this.question({ draws, shown: DRAWN, moved: this.moved }));
    paint(this.mean, answer.mean, shape);
    this.caption.textContent = `the mean of ${answer.draws} drawings`;
    fillRow(this.drawn, answer.drawn);
  }

  async loadNear() {
    const answer = await ask("neighbours", this.question({ count: NEAREST }));
    this.near.replaceChildren(...answer.images.map(image => {
      const title = `${described(image)}, distance ${image.distance.toFixed(2)}`;
      const button = element("button", { type: "button", className: "thumb", title },
        picture(image.pixels, shape), element("span", { textContent: image.label ?? "" }));
      button.addEventListener("click", () => choose({ sample: image.sample }, image));
      return button;
    }));
    find("among").textContent = `The images whose codes are nearest to this image’s, among the first `
      + `${number.format(answer.among)} ${about.split} images. Click one to look at it.`;
  }

  async loadWalk() {
    const [to, walked] = await Promise.all([
      ask("code", this.question({ image: state.second.image })),
      ask("walk", this.question({ to: state.second.image, steps: STEPS })),
    ]);
    paint(this.ends[1], to.seen, shape);
    if (this.walk.children.length !== STEPS + 2) {
      const between = walked.drawn.map(() => picture());
      this.walk.replaceChildren(this.ends[0], ...between, this.ends[1]);
    }
    walked.drawn.forEach((text, step) => paint(this.walk.children[step + 1], text, shape));
  }

  move(moved) {
    this.moved = moved;
    this.showLatents();
    this.askDrawn();
  }

  showLatents() {
    if (!this.code) return;
    const all = this.code.latents, shown = this.showsAll ? all : all.slice(0, LATENTS);
    const most = Math.max(...all.map(latent => latent.capacity_bits ?? 0), 1e-9);
    this.sliders.replaceChildren(...shown.map(latent => this.slider(latent, most)));
    this.more.hidden = all.length <= LATENTS;
    this.more.textContent = this.showsAll ? `Show ${LATENTS}` : `Show ${all.length}`;
    this.back.disabled = !Object.keys(this.moved).length;
  }

  slider(latent, most) {
    const reach = Math.max(REACH, Math.ceil(Math.abs(latent.place) + 1));
    const at = place => `${100 * (place + reach) / (2 * reach)}%`;
    const name = `z${latent.latent}`, capacity = latent.capacity_bits;
    const value = latent.place + (this.moved[latent.latent] ?? 0) / latent.spread;
    const input = element("input", {
      type: "range", min: -reach, max: reach, step: "any", value,
      title: `${name}: the arrow keys move it, a double click puts it back`,
    });
    input.setAttribute("aria-label", `latent ${latent.latent}`);
    const output = element("output");
    const line = element("div", { className: "latent" });
    const tellValue = () => {
      output.textContent = `${input.value < 0 ? "−" : "+"}${Math.abs(input.value).toFixed(1)} sd`;
      line.classList.toggle("moved", latent.latent in this.moved);
    };
    tellValue();
    const set = place => {
      const distance = (place - latent.place) * latent.spread;
      if (Math.abs(place - latent.place) < STEP / 2) delete this.moved[latent.latent];
      else this.moved[latent.latent] = distance;
      this.back.disabled = !Object.keys(this.moved).length;
      tellValue();
      this.askDrawn();
    };
    input.addEventListener("input", () => { this.isMoving = true; set(Number(input.value)); });
    input.addEventListener("change", () => { this.isMoving = false; this.askDrawn(); });
    input.addEventListener("dblclick", () => { input.value = latent.place; set(latent.place); });
    input.addEventListener("keydown", event => {
      const turn = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
      if (!turn) return;
      event.preventDefault();
      input.value = Number(input.value) + 2 * turn * STEP;
      set(Number(input.value));
    });
    const track = element("div", { className: "track" });
    if (latent.width !== null) {
      const band = element("div", { className: "band", title: "the posterior of this image, one standard deviation to each side" });
      band.style.left = at(Math.max(-reach, latent.place - latent.width));
      band.style.right = `calc(100% - ${at(Math.min(reach, latent.place + latent.width))})`;
      track.append(band);
    }
    track.append(input);
    const told = element("span", { className: "capacity" }, element("span", { textContent: name }));
    if (capacity !== null) {
      const meter = element("i");
      meter.style.width = `${100 * Math.max(0, capacity) / most}%`;
      told.append(element("span", { textContent: `${capacity.toFixed(1)} bits` }), meter);
      told.title = `${name} alone tells at most ${capacity.toFixed(2)} bits about an image`;
    }
    line.append(told, track, output);
    return line;
  }
}

function showBars() {
  const known = cards.filter(card => card.code);
  const most = Math.max(...known.map(({ code }) => Math.max(0, code.rate_bits) + Math.max(0, code.distortion_bits)));
  known.forEach(card => card.showBar(most));
}

// --- choosing an image -------------------------------------------------------------------------

function described(image) {
  return [`image ${number.format(image.sample)}`, image.label, image.name].filter(part => part !== null).join(", ");
}

// ``image`` is what is asked about; ``shown`` is how it looks and what it is called.
function choose(image, shown) {
  const slot = state[state.active] = { image, pixels: shown.pixels };
  const button = find(state.active);
  paint(button.querySelector("canvas"), slot.pixels, shape);
  button.querySelector("i").textContent = shown.sample === undefined ? "your drawing" : described(shown);
  markThumbs();
  for (const card of cards) {
    if (state.active === "first") {
      card.moved = {};
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
    const button = element("button", { type: "button", className: "thumb", title: described(image) },
      picture(image.pixels, shape));
    button.dataset.sample = image.sample;
    button.addEventListener("click", () => choose({ sample: image.sample }, image));
    return button;
  }));
  find("range").textContent = `${number.format(state.start)} – ${number.format(state.start + images.length - 1)} of ${number.format(about.images)}`;
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
  state.start = Math.max(0, Math.min(state.start + pages * PAGE, about.images - 1));
  askPage();
}

async function search(event) {
  event.preventDefault();
  const text = find("wanted").value.trim();
  if (!text) return;
  try {
    const after = state[state.active]?.image.sample ?? -1;
    const sample = /^\d{1,15}$/.test(text) ? Number(text) : (await ask("find", { text, after })).sample;
    if (sample >= about.images) throw new Error(`there is no image ${text}; the last one is ${about.images - 1}`);
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

function setUpDrawing() {
  drawing = new Drawing(find("paper"), shape, useDrawing);
  const grey = about.binary ? ["#ffffff", "#000000"] : ["#ffffff", "#aaaaaa", "#555555", "#000000"];
  const colours = ["#ffffff", "#000000", "#d03b3b", "#eb8f34", "#f2d13c", "#3c9a4b", "#3b77d0", "#7d4fb0", "#8b5a3c"];
  for (const colour of shape[0] === 3 ? colours : grey) {
    const input = element("input", { type: "radio", name: "colour", value: colour, checked: colour === drawing.colour });
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

function tellAbout({ encoded, to_encode, problem }) {
  const [channels, height, width] = shape;
  const progress = problem ? ` ${problem}.`
    : encoded < to_encode ? ` ${number.format(encoded)} of the first ${number.format(to_encode)} are encoded.` : "";
  find("about").textContent = `${number.format(about.images)} ${about.split} images of data set ${about.dataset}, `
    + `${width} × ${height}, ${channels === 3 ? "in colour" : about.binary ? "in black and white" : "in grey"}.${progress}`;
  return !problem && encoded < to_encode;
}

// What is known of the latents, and the neighbours, improve until all images are encoded.
async function follow() {
  try {
    let goesOn = tellAbout(about);
    if (!goesOn) return;
    while (goesOn) {
      await new Promise(resolve => setTimeout(resolve, 1000));
      goesOn = tellAbout(await ask("progress"));
    }
    for (const card of cards) {
      card.askCode();
      card.askNear();
    }
  } catch (error) {
    tell(error.message);
  }
}

function row(card, strip) {
  return element("div", { className: "row" }, element("h3", { textContent: card.model.name }), strip);
}

async function start() {
  about = await ask("start");
  shape = about.shape;
  cards = about.models.map((model, place) => new Card(model, place));
  find("cards").append(...cards.map(card => card.box));
  find("near").append(...cards.map(card => row(card, card.near)));
  find("walk").append(...cards.map(card => row(card, card.walk)));
  find("wanted").placeholder = about.named ? "number or name" : "number";
  document.querySelector("main").hidden = false;
  setUpDrawing();
  find("find").addEventListener("submit", search);
  find("previous").addEventListener("click", () => turnPage(-1));
  find("next").addEventListener("click", () => turnPage(1));
  for (const name of ["pick", "draw"]) find(`tab-${name}`).addEventListener("click", () => openTab(name));
  for (const name of ["first", "second"]) find(name).addEventListener("click", () => activate(name));
  find("again").addEventListener("click", () => {
    state.seed++;
    for (const card of cards) {
      card.askDrawn();
      card.askWalk();
    }
  });
  await askPage();
  const { images } = await ask("images", { start: 0, count: 2 });
  activate("second");
  choose({ sample: images.at(-1).sample }, images.at(-1));
  activate("first");
  choose({ sample: 0 }, images[0]);
  follow();
}

start().catch(error => tell(error.message));
