// Asking the server, which answers for the secret in the address alone.

const secret = location.hash.slice(1);
addEventListener("hashchange", () => location.reload());  // the address of another explorer
let pending = 0;

export async function ask(what, question = {}) {
  document.body.classList.toggle("busy", ++pending > 0);
  try {
    const answer = await fetch(`/api/${what}`, {
      method: "POST", body: JSON.stringify(question),
      headers: { "Authorization": `Bearer ${secret}`, "Content-Type": "application/json" },
    }).catch(() => {
      throw new Error("vlae explore has stopped; start it again, and open its new address");
    });
    const values = await answer.json();
    if (!answer.ok) throw new Error(values.error);
    return values;
  } finally {
    document.body.classList.toggle("busy", --pending > 0);
  }
}

export function tell(problem) {
  const place = document.getElementById("problem");
  place.textContent = problem;
  place.hidden = !problem;
}

// One question at a time; of what changes while it is answered, only the last state is asked about.
export function latest(work) {
  let isRunning = false, isStale = false;
  return async () => {
    isStale = true;
    if (isRunning) return;
    isRunning = true;
    while (isStale) {
      isStale = false;
      try {
        await work();
      } catch (error) {
        tell(error.message);
      }
    }
    isRunning = false;
  };
}
