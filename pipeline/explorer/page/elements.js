// Elements of the page, and images as the server sends and takes them: base64 of their bytes, row
// by row, with the channels last.

const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
export const count = value => number.format(value);

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// One digit after the point, unless the number is so large that nobody would read it.
export function figure(value) {
  return (Math.abs(value) < 100 ? tenths : number).format(value);
}

export function paint(canvas, text, [channels, height, width]) {
  const bytes = atob(text), image = new ImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    for (let channel = 0; channel < 3; channel++) {
      image.data[4 * pixel + channel] =
        bytes.charCodeAt(channels * pixel + (channels === 3 ? channel : 0));
    }
    image.data[4 * pixel + 3] = 255;
  }
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}

export function toText(bytes) {
  let characters = "";
  for (const byte of bytes) characters += String.fromCharCode(byte);
  return btoa(characters);
}

export function picture(text, shape, title = "") {
  const canvas = document.createElement("canvas");
  canvas.className = "picture";
  canvas.title = title;
  if (text) paint(canvas, text, shape);
  return canvas;
}

// Puts images into a row, in the canvases that are there already: they do not flicker.
export function fillRow(row, texts, shape) {
  while (row.children.length > texts.length) row.lastChild.remove();
  texts.forEach((text, place) => {
    if (!row.children[place]) row.append(picture());
    paint(row.children[place], text, shape);
  });
}

export function described(image) {
  const parts = [`image ${count(image.sample)}`, image.label, image.name];
  return parts.filter(part => part !== null).join(", ");
}
