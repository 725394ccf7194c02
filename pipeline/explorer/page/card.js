// A model on the page: the image redrawn, its bits and latents, and rows of neighbours and walks.

import { ask, latest } from "/asking.js";
import { count, described, element, figure, fillRow, paint, picture } from "/elements.js";

const DRAWN = 4, STEPS = 9, NEAREST = 12, LATENTS = 8;
const DRAWS = 32, QUICK_DRAWS = 8;  // drawings that the mean is of: at rest, and while one moves
const REACH = 3;  // standard deviations from the middle of a slider to its ends
const STEP = 0.05;

export class Card {
  // ``place`` is the model's in ``page.about.models``. ``page.chosen`` holds the images that are
  // looked at and the seed. ``page.choose`` looks at another image; ``page.compare`` is called when
  // there are new bits.
  constructor(place, page) {
    const model = page.about.models[place];
    Object.assign(this, page, { place, model, shape: page.about.shape });
    this.moved = {};
    this.isMoving = false;
    this.showsAll = false;
    this.seen = picture();
    this.mean = picture();
    this.drawn = element("div", { className: "drawn" });
    this.caption = element("figcaption");
    this.rows = element("tbody");
    this.bar = element("div", { className: "bar" }, element("i"), element("i"));
    this.resolution = element("p", { className: "note", hidden: true });
    this.sliders = element("div", { className: "sliders" });
    this.back = element("button", { type: "button", textContent: "Put back", disabled: true });
    this.more = element("button", { type: "button" });
    this.back.addEventListener("click", () => this.move({}));
    this.more.addEventListener("click", () => {
      this.showsAll = !this.showsAll;
      this.showLatents();
    });
    this.box = element("article", { className: "card" },
      element("h3", { textContent: model.name }),
      element("p", { className: "note", textContent: model.about }),
      this.resolution,
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

  row(strip) {
    const name = element("h3", { textContent: this.model.name });
    return element("div", { className: "row" }, name, strip);
  }

  question(values = {}) {
    return { model: this.place, image: this.chosen.first.image, seed: this.chosen.seed, ...values };
  }

  async loadCode() {
    const code = await ask("code", this.question());
    this.code = code;
    paint(this.seen, code.seen, this.shape);
    paint(this.ends[0], code.seen, this.shape);
    const bytes = bits => figure(bits / 8);
    const rows = [
      ["rate", "rate: the code", "rate_bits", `${bytes(code.rate_bits)} bytes`],
      ["distortion", "distortion: the pixels", "distortion_bits", ""],
      ["", "together, without loss", "code_length_bits",
       `${bytes(code.code_length_bits)} of ${bytes(this.model.raw_bits)} bytes`],
    ];
    this.rows.replaceChildren(...rows.map(([kind, label, key, length]) => {
      const bits = `${figure(code[key])} bits`, title = `± ${figure(code[`${key}_se`])} bits`;
      return element("tr", {},
        element("td", {}, element("i", { className: kind }), label),
        element("td", { textContent: bits, title }),
        element("td", { textContent: length }));
    }));
    this.compare();
    if (!this.isMoving) this.showLatents();  // a slider under the mouse stays
  }

  showBar(most) {
    const [rate, distortion] = this.bar.children;
    rate.style.width = `${100 * Math.max(0, this.code.rate_bits) / most}%`;
    distortion.style.width = `${100 * Math.max(0, this.code.distortion_bits) / most}%`;
  }

  showResolution(known) {
    if (!known) return;
    const { resolution_px: px, resolution_px_se: error } = known;
    const { num_images, finest_px } = known.resolution;
    this.resolution.hidden = false;
    this.resolution.textContent = "resolution: "
      + (px === null ? "none, structure of every size is redrawn"
        : px === finest_px ? `${px.toFixed(1)} px, all that pixels can show`
        : `${px.toFixed(1)} px, what is finer is redrawn`);
    this.resolution.title = `measured on the first ${count(num_images)} ${this.about.split} images`
      + (error === null ? "" : `; the standard error is ${error.toFixed(2)} px`);
  }

  async loadDrawn() {
    const draws = this.isMoving ? QUICK_DRAWS : DRAWS;
    const answer = await ask("redraw", this.question({ draws, shown: DRAWN, moved: this.moved }));
    paint(this.mean, answer.mean, this.shape);
    this.caption.textContent = `the mean of ${answer.draws} drawings`;
    fillRow(this.drawn, answer.drawn, this.shape);
  }

  async loadNear() {
    const answer = await ask("neighbours", this.question({ count: NEAREST }));
    this.near.replaceChildren(...answer.images.map(image => {
      const title = `${described(image)}, distance ${image.distance.toFixed(2)}`;
      const button = element("button", { type: "button", className: "thumb", title },
        picture(image.pixels, this.shape), element("span", { textContent: image.label ?? "" }));
      button.addEventListener("click", () => this.choose({ sample: image.sample }, image));
      return button;
    }));
    document.getElementById("among").textContent =
      `The images whose codes are nearest to this image’s, among the first `
      + `${count(answer.among)} ${this.about.split} images. Click one to look at it.`;
  }

  async loadWalk() {
    const [to, walked] = await Promise.all([
      ask("code", this.question({ image: this.chosen.second.image })),
      ask("walk", this.question({ to: this.chosen.second.image, steps: STEPS })),
    ]);
    paint(this.ends[1], to.seen, this.shape);
    if (this.walk.children.length !== STEPS + 2) {
      const between = walked.drawn.map(() => picture());
      this.walk.replaceChildren(this.ends[0], ...between, this.ends[1]);
    }
    walked.drawn.forEach((text, step) => paint(this.walk.children[step + 1], text, this.shape));
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
      input.setAttribute("aria-valuetext", `${input.value} standard deviations`);
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
      const title = "the posterior of this image, one standard deviation to each side";
      const band = element("div", { className: "band", title });
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
