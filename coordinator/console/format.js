// Numbers for people.

export function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let value = count, unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

export function seconds(value) {
  if (value === null) return "unknown";
  if (value < 0.001) return `${Math.round(value * 1e6)} µs`;
  if (value < 1) return `${(value * 1000).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  if (value < 7200) return `${Math.round(value / 60)} min`;
  return `${Math.round(value / 3600)} h`;
}

export const rate = (value) => (value >= 100 ? Math.round(value) : value.toFixed(1));
export const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
export const layers = (range) => (range === null ? "none" : range[0] === range[1] ? `layer ${range[0]}` : `layers ${range[0]}–${range[1]}`);
