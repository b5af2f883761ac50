// The part of Preact's hooks that the page uses, for the type checker.
export function useEffect(run: () => void | (() => void), on?: any[]): void;
export function useLayoutEffect(run: () => void | (() => void), on?: any[]): void;
export function useRef<T>(value: T): {current: T};
export function useState<T>(value: T | (() => T)): [T, (value: T | ((before: T) => T)) => void];
export function useId(): string;
