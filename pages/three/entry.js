export {
  AmbientLight, Box3, PerspectiveCamera, Scene, Sphere, Spherical, Vector3, WebGLRenderer,
} from 'three';
export { OrbitControls } from 'three/addons/controls/OrbitControls.js';
export { GLTFLoader } from 'three/addons/loaders/GLTFLoader.js';
