// The paper that is drawn on: several times as fine as the image that the models see of it.

const PAPER = 280;  // about how many pixels wide and high it is
const LUMINANCE = [0.299, 0.587, 0.114];

export class Drawing {
  constructor(canvas, [channels, height, width], changed, [paper, colour]) {
    this.canvas = canvas;
    this.channels = channels;
    this.fine = Math.max(1, Math.floor(PAPER / Math.max(height, width)));
    canvas.width = width * this.fine;
    canvas.height = height * this.fine;
    this.paper = canvas.getContext("2d", { willReadFrequently: true });
    this.colour = colour;
    this.brush = 2;  // pixels of the image
    this.changed = changed;
    this.fill(paper);
    let last = null;
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      last = this.place(event);
      this.line(last, last);
    });
    canvas.addEventListener("pointermove", event => {
      if (!last) return;
      const place = this.place(event);
      this.line(last, place);
      last = place;
    });
    for (const end of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(end, () => { last = null; });
    }
  }

  place(event) {
    const box = this.canvas.getBoundingClientRect();
    return [(event.clientX - box.left) * this.canvas.width / box.width,
            (event.clientY - box.top) * this.canvas.height / box.height];
  }

  line(from, to) {
    this.paper.lineCap = this.paper.lineJoin = "round";
    this.paper.lineWidth = this.brush * this.fine;
    this.paper.strokeStyle = this.colour;
    this.paper.beginPath();
    this.paper.moveTo(...from);
    this.paper.lineTo(...to);
    this.paper.stroke();
    this.changed();
  }

  fill(colour) {
    this.paper.fillStyle = colour;
    this.paper.fillRect(0, 0, this.canvas.width, this.canvas.height);
  }

  // The middle of a picture of any size, as large as fits.
  show(source, smooth) {
    const { width, height } = this.canvas;
    const scale = Math.max(width / source.width, height / source.height);
    const size = [source.width * scale, source.height * scale];
    this.fill("#ffffff");  // behind what is transparent
    this.paper.imageSmoothingEnabled = smooth;
    this.paper.imageSmoothingQuality = "high";
    this.paper.drawImage(source, (width - size[0]) / 2, (height - size[1]) / 2, ...size);
  }

  // The image that the models see: each pixel is the mean of its part of the paper.
  pixels() {
    const { width, height } = this.canvas, { fine, channels } = this;
    const data = this.paper.getImageData(0, 0, width, height).data;
    const columns = width / fine, sums = new Float64Array(columns * (height / fine) * channels);
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const from = 4 * (y * width + x);
        const to = channels * (Math.floor(y / fine) * columns + Math.floor(x / fine));
        if (channels === 3) {
          for (let channel = 0; channel < 3; channel++) sums[to + channel] += data[from + channel];
        } else {
          LUMINANCE.forEach((weight, channel) => { sums[to] += weight * data[from + channel]; });
        }
      }
    }
    return Uint8Array.from(sums, sum => Math.round(sum / (fine * fine)));
  }
}
