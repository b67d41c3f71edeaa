// Sources of photos: a sample, a file, the camera, a drop or the clipboard.

import { byId } from "./dom.js";

const FIRST_SAMPLE = "dalmatian";
const LARGEST_PX = 1024; // larger photos are scaled down: the model sees a few hundred, and sliders send many requests
const LARGEST_BYTES = 400_000;

/** Fetch a sample as a file. */
export async function sample(name = FIRST_SAMPLE) {
  const response = await fetch(`web/samples/${name}.jpg`);
  return new File([await response.blob()], `${name}.jpg`, { type: "image/jpeg" });
}

/** Make the bitmap to show and the body to send; a file that the browser cannot decode is sent unchanged. */
async function prepare(file) {
  let bitmap = null;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return { file, bitmap, body: file };
  }
  const longest = Math.max(bitmap.width, bitmap.height);
  if (longest <= LARGEST_PX && file.size <= LARGEST_BYTES) return { file, bitmap, body: file };
  const scale = Math.min(1, LARGEST_PX / longest);
  const canvas = new OffscreenCanvas(Math.round(bitmap.width * scale), Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // behind transparent pixels, as on the server
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return { file, bitmap, body: await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 }) };
}

/** Call `take` with every photo that the user chooses; return a function that chooses the first sample. */
export function watchPhotos(take) {
  let latest = 0;
  const give = async (file) => {
    const number = ++latest;
    const photo = await prepare(file);
    if (number === latest) take(photo);
  };
  const press = (name) => {
    for (const button of byId("samples").children) button.setAttribute("aria-pressed", button.dataset.name === name);
  };
  const own = (files) => {
    if (!files?.length) return;
    press(null);
    give(files[0]);
  };
  const pick = async (name) => {
    press(name);
    give(await sample(name));
  };

  for (const button of byId("samples").children) button.addEventListener("click", () => pick(button.dataset.name));
  for (const id of ["file", "camera"]) {
    byId(id).addEventListener("change", ({ target }) => {
      own(target.files);
      target.value = ""; // so that the same file can be chosen again
    });
  }
  document.addEventListener("paste", ({ clipboardData }) => own(clipboardData.files));

  const drop = byId("drop");
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    drop.hidden = false;
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => {
    if (!relatedTarget) drop.hidden = true;
  });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.hidden = true;
    own(event.dataTransfer.files);
  });
  return () => pick(FIRST_SAMPLE);
}
