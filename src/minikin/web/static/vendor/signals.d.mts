// The part of Preact's signals that the page uses, for the type checker.
export interface Signal<T> { value: T; peek(): T; subscribe(run: (value: T) => void): () => void }
export function signal<T>(value: T): Signal<T>;
export function computed<T>(get: () => T): {readonly value: T; peek(): T};
export function effect(run: () => void | (() => void)): () => void;
export function batch<T>(run: () => T): T;
