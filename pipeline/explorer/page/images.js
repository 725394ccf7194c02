// Images as the server sends and takes them: base64 of their bytes, row by row, the channels last.

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
